"""Calibration: on how many samples, and which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from experiments import checks
from experiments.errors import ConfigError
from experiments.models.adapter import Sample

INPUTS = ("finetuned", "sequential")


@dataclass(frozen=True)
class Calibration:
    """``samples``: training sequences that the Grams are taken over; ``held_out``: development ones for the report.

    ``inputs`` says what layers read while they are calibrated: what the `finetuned` model makes of the samples, or,
    `sequential`, what the layers below them do that are fused already. ``retain`` says whose samples stand for the old
    tasks (`experiments.stages.retain`), for methods that see such, and ``retain_samples`` how many. ``damping`` and
    ``compare_decorators`` are for the methods that use the Grams (`tailor.methods.tailor.Tailor`).
    """

    samples: int
    held_out: int
    batch_size: int
    inputs: str
    retain: str
    retain_samples: int
    damping: float
    compare_decorators: bool

    def __post_init__(self) -> None:
        checks.whole(self, "samples", "held_out", "batch_size", "retain_samples")
        checks.one_of(self, "inputs", INPUTS)
        checks.real(self, "damping")
        checks.boolean(self, "compare_decorators")

    def collection(self) -> dict[str, int]:
        """The fields that decide the stored Grams of the target; the others come in when these are used."""
        return {"samples": self.samples, "held_out": self.held_out, "batch_size": self.batch_size}


def draw(rows: Sequence[Sequence[Sample]], count: int, seed: int, setting: str) -> list[Sample]:
    """``count`` different rows at random, the first answer of each. Raises ConfigError naming ``setting``."""
    if not 0 < count <= len(rows):
        raise ConfigError(f"{setting}={count}: there are {len(rows)} rows to draw from; ask for 1 to {len(rows)}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[index][0] for index in order[:count]]
