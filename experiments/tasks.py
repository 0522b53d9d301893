"""The stages of one target task: fine-tuning on it, its Grams, and what else methods ask of it.

They depend on nothing but the task and the base model, so that runs with one target and with several share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from experiments.artifacts import Artifact
from experiments.context import CHECKPOINT, Context
from experiments.data import Task, identity, module_of
from experiments.models.adapter import Sample
from experiments.stages.calibrate import draw
from experiments.stages.fuse import Weights
from experiments.stages.grams import collect_grams
from experiments.stages.target import TargetLoss
from tailor.checkpoint import Checkpoint
from tailor.gram import Grams
from tailor.method import GramEvidence
from tailor.scope import changed_tensors

SAMPLES, HELD_OUT = "samples", "held_out"


@dataclass(frozen=True)
class TaskStages:
    """``whose`` is the task's name in the run's record of stages, "" for the run's own task."""

    context: Context
    task: Task
    whose: str

    @cached_property
    def finetuned(self) -> Artifact:
        parts = self.context.parts
        inputs = {**self.data, "base": self.context.base.key, "training": identity(parts.training)}

        def make(out: Path) -> None:
            rows = self.task.samples(self.task.train, parts.model.adapter.prompt_style)
            losses = parts.training.finetune(
                parts.model.adapter, self.context.base_folder, rows, out / CHECKPOINT, parts.seed, self.context.device
            )
            pd.DataFrame({"step": range(1, len(losses) + 1), "loss": losses}).to_csv(out / "losses.csv", index=False)

        modules = [module_of(parts.training), *self.modules]
        return self.context.builds.build("finetuned", inputs, modules, make, self._label("finetuned"))

    @property
    def finetuned_folder(self) -> Path:
        return self.finetuned.folder / CHECKPOINT

    @cached_property
    def grams(self) -> Artifact:
        parts, adapter = self.context.parts, self.context.parts.model.adapter
        inputs = {**self.data, "finetuned": self.finetuned.key, "calibration": parts.calibration.collection()}

        def make(out: Path) -> None:
            loaded = self.context.load(Weights(self.finetuned_folder, None), torch.float32)
            layers = changed_tensors(Checkpoint(self.context.base_folder), Checkpoint(self.finetuned_folder))
            batch_size = parts.calibration.batch_size
            for name in (SAMPLES, HELD_OUT):
                grams = collect_grams(adapter, loaded, self.samples(name), layers, batch_size, f"calibrate ({name})")
                grams.save(out / f"{name}.safetensors")

        modules = [collect_grams.__module__, *self.modules]
        return self.context.builds.build("grams", inputs, modules, make, self._label("grams"))

    def evidence(self, retain: Grams | None = None) -> GramEvidence:
        """The task's Grams, and those of samples of old tasks if there are any."""
        folder = self.grams.folder
        grams = (Grams.load(folder / f"{name}.safetensors") for name in (SAMPLES, HELD_OUT))
        return GramEvidence(*grams, retain=retain)

    def loss(self) -> TargetLoss:
        """The task as a function of the weights, at first the pretrained ones."""
        return TargetLoss(
            self.context.parts.model.adapter,
            self.context.load(Weights(self.context.base_folder, None), torch.float32),
            self.samples(SAMPLES),
            self.samples(HELD_OUT),
            self.context.parts.calibration.batch_size,
        )

    @property
    def data(self) -> dict[str, object]:
        """The inputs of every stage that turns the task's rows into batches."""
        parts = self.context.parts
        return {
            "task": self.task.identity(),
            "adapter": identity(parts.model.adapter),
            "seed": parts.seed,
            "device": parts.device,
        }

    @property
    def modules(self) -> list[str]:
        """The code that does so."""
        task, adapter = self.task, self.context.parts.model.adapter
        return [module_of(part) for part in (task, task.test.benchmark, task.train, task.dev, adapter)]

    def _label(self, stage: str) -> str:
        return f"{stage}/{self.whose}" if self.whose else stage

    def samples(self, setting: str) -> list[Sample]:
        """The calibration's ``samples`` from the target's training rows, or its ``held_out`` from development rows."""
        parts, task = self.context.parts, self.task
        rows = task.samples(task.dev if setting == HELD_OUT else task.train, parts.model.adapter.prompt_style)
        return draw(rows, getattr(parts.calibration, setting), parts.seed, f"calibration.{setting}")
