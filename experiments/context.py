"""What all stages of a run share: its parts, where artifacts are kept, and the pretrained model they start from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from experiments.artifacts import Artifact
from experiments.data import identity, module_of
from experiments.models.adapter import Loaded, Placement
from experiments.runs import Builds
from experiments.schema import Experiment
from experiments.stages.fuse import Weights
from tailor.checkpoint import Checkpoint
from tailor.patch import Patch

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Context:
    """The surroundings of a run's stages."""

    parts: Experiment
    builds: Builds
    device: torch.device

    @cached_property
    def base(self) -> Artifact:
        base = self.parts.model.base

        def make(out: Path) -> None:
            base.build(out / CHECKPOINT)

        return self.builds.build("base", {"base": identity(base)}, [module_of(base)], make)

    @property
    def base_folder(self) -> Path:
        return self.base.folder / CHECKPOINT

    def load(self, weights: Weights, dtype: torch.dtype) -> Loaded:
        loaded = self.parts.model.adapter.load(weights.folder, dtype, Placement(self.device))
        if weights.patch is not None:
            loaded.set_weights(Patch.load(weights.patch).apply_to(Checkpoint(weights.folder)))
        return loaded
