"""Fusion of a run whose layers read what the already fused layers below them give, as SparseGPT walks a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.checkpoints import fingerprint
from experiments.context import Context
from experiments.data import identity, module_of
from experiments.models.adapter import Placement, Sample
from experiments.shares import Model, Outcome, Shares, Source, TaskSources
from experiments.stages.fuse import PATCH, write_report
from experiments.tasks import HELD_OUT, SAMPLES, TaskStages
from tailor.align import Only
from tailor.checkpoint import Checkpoint
from tailor.fuse import fuse_to_patch
from tailor.method import GramEvidence, Method, is_separable
from tailor.patch import Patch
from tailor.report import FusionReport, TensorReport
from tailor.scope import changed_tensors


def fuse_sequentially(
    out: Path, context: Context, task: TaskStages, method: Method, retained: Sequence[Sample] | None
) -> None:
    """Writes the fusion report and the patch. ``retained``: samples of old tasks, for methods that see such."""
    parts, base = context.parts, Checkpoint(context.base_folder)
    tuned = Checkpoint(task.finetuned_folder)

    def fuse(
        names: Sequence[str], evidence: Sequence[GramEvidence], device: torch.device
    ) -> tuple[Patch, FusionReport]:
        some = Only(base, names), Only(tuned, names)
        return fuse_to_patch(*some, method, evidence=evidence[0], seed=parts.seed, device=device)

    def model(folder: Path) -> Model:
        return Model(
            parts.model.adapter, folder, fingerprint(folder, Path(parts.home)), torch.float32, Placement(context.device)
        )

    def source(name: str, of: Model, samples: Sequence[Sample]) -> Source:
        return Source(name, of, samples, parts.calibration.batch_size, context.builds)

    learner = model(task.finetuned_folder)
    shares = Shares(
        builds=context.builds,
        names=changed_tensors(base, tuned),
        tasks=[TaskSources(*(source(name, learner, task.samples(name)) for name in (SAMPLES, HELD_OUT)))],
        retain=None if retained is None else source("retain", model(context.base_folder), retained),
        devices=[context.device],
        memory_bytes=0,
        is_separable=is_separable(method),
        fuse=fuse,
        inputs={
            "method": identity(method),
            "base": context.base.key,
            "finetuned": task.finetuned.key,
            "seed": parts.seed,
        },
        modules=[module_of(method), fuse_to_patch.__module__],
    )
    fused: Outcome = shares.sequential(lambda patch: patch.apply_to(base))
    fused.patch.save(out / PATCH)
    known = {row.name for row in fused.rows}
    copied = [TensorReport(name, base.shape(name), "copied") for name in base if name not in known]
    write_report(out, FusionReport.of(method, parts.seed, [*fused.rows, *copied]))
