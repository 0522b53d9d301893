"""Stitched tailoring: Model Tailor for several tasks at once (App. B.2)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tailor.decorate import DECORATORS, Decorator
from tailor.fuse import Weights
from tailor.method import EvidenceKind, GramEvidence, require_between, require_one_of
from tailor.methods.tailor import Tailor
from tailor.patch import Patch
from tailor.report import FusionReport
from tailor.stitch import STITCHINGS, Stitching, require_decorator, stitch
from tailor.support import PRECISIONS, Precision


@dataclass(frozen=True)
class Stitched:
    """The patches of several fine-tuned models of one base, stitched; `tailor.stitch` says `how`.

    `sparsity`, in [0, 1], is the fraction that the tasks may keep together: each of m keeps sparsity / m, as the
    paper's two at 5 % make its 10 %. `omega`, `decorator`, `damping` and `precision` are as in `Tailor`; `joint` solves
    for the compensation itself and wants the decorator `exact`.

    It is no `tailor.method.Method`, which fuses one fine-tuned model: its verb takes several, each with its Grams.
    """

    how: Stitching
    sparsity: float
    omega: float = 0.5
    decorator: Decorator = "sparsegpt"
    damping: float = 0.01
    precision: Precision = "float32"
    needs: ClassVar[EvidenceKind] = "grams"

    def __post_init__(self) -> None:
        require_one_of(self, "how", STITCHINGS)
        require_between(self, "sparsity", 0, 1)
        require_between(self, "omega", 0, 1)
        require_one_of(self, "decorator", DECORATORS)
        require_between(self, "damping", 0, sys.float_info.max)
        require_one_of(self, "precision", PRECISIONS)
        require_decorator(self.how, self.decorator)

    def stitch(
        self,
        pretrained: Weights,
        finetuned: Sequence[Weights],
        *,
        evidence: Sequence[GramEvidence],
        seed: int = 0,
        device: str | torch.device = "cpu",
        progress: Callable[[str], None] | None = None,
    ) -> tuple[Patch, FusionReport]:
        """`tailor.stitch.stitch` with each task's share of the sparsity, which is what patch and report state."""
        sparsity = self.sparsity / max(len(finetuned), 1)
        each = Tailor(sparsity, self.omega, self.decorator, self.damping, precision=self.precision)
        return stitch(
            pretrained, finetuned, each, self.how, evidence=evidence, seed=seed, device=device, progress=progress
        )
