"""A fusion of given checkpoints from end to end: align, calibrate, fuse, write, and account for every tensor."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.artifacts import Store
from experiments.checkpoints import fingerprint, is_lora, merge_lora
from experiments.data import identity, module_of
from experiments.errors import ConfigError
from experiments.fuse_checks import check, require_room
from experiments.fuse_config import Fusing
from experiments.models.adapter import Adapter, Placement, Sample, device_of
from experiments.models.families import adapter_of
from experiments.runs import Builds, Record
from experiments.samples import drawn
from experiments.shares import Model, Outcome, Shares, Source, TaskSources
from experiments.stages.fuse import advancing, write_report
from experiments.stages.target import TargetLoss
from tailor.align import Aligned, Only, align, require_precision
from tailor.checkpoint import Checkpoint
from tailor.fuse import fuse_to_patch, fused_tensors, write_completed
from tailor.method import Evidence, GramEvidence, is_separable, sees_old_tasks
from tailor.methods.stitched import Stitched
from tailor.patch import Patch
from tailor.report import Fate, FusionReport, TensorReport
from tailor.scope import changed_tensors, select

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
Stream = Iterator[tuple[str, Tensor, TensorReport]]


def run(parts: Fusing, folder: Path, record: Record) -> None:
    """Fuses, and leaves the fusion report in ``folder``."""
    if parts.threads is not None:
        torch.set_num_threads(parts.threads)
    check(parts)
    require_room(parts)
    fusion = Fusion(parts, Builds(Store(parts.home, {"threads": torch.get_num_threads()}), record))
    report = fusion.write()
    write_report(folder, report)
    tell(report, parts)


@dataclass(frozen=True)
class Fusion:
    """The parts of one fusion, each made when it is first asked for."""

    parts: Fusing
    builds: Builds

    def write(self) -> FusionReport:
        """Writes what was asked for, checkpoint and patch, and returns the report on every tensor."""
        parts = self.parts
        if not self.names:
            log.warning("fine-tuning changed nothing in scope: the result is the pretrained checkpoint")
        fused: Outcome | None = None
        if parts.method.needs == "grams" or parts.patch is not None:
            fused = self._in_shares() if parts.method.needs == "grams" else self._as_patch()
        rows = self._written(self._streamed() if fused is None else self._patched(fused))
        if parts.patch is not None and fused is not None:
            fused.patch.save(parts.patch)
        return FusionReport.of(parts.method, parts.seed, rows)

    def _written(self, stream: Stream) -> list[TensorReport]:
        """The stream's rows of the report; its tensors are written if there is an ``out``."""
        aligned, out = self.aligned[0], self.parts.out
        if out is None:
            return [*aligned.dropped_rows(), *(row for _, _, row in aligned.completed(stream))]
        return write_completed(aligned, stream, out, self.folders[0], self.parts.max_shard_bytes)

    @cached_property
    def folders(self) -> tuple[Path, ...]:
        """The fine-tuned checkpoints; LoRA adapters are merged into the pretrained one."""
        return tuple(self._merged(folder) if is_lora(folder) else folder for folder in self.parts.finetuned)

    @cached_property
    def aligned(self) -> tuple[Aligned, ...]:
        """The pretrained checkpoint with each of the fine-tuned ones, names and shapes brought together."""
        parts, base = self.parts, Checkpoint(self.parts.pretrained)
        aligned = tuple(
            align(base, Checkpoint(folder), embeddings=parts.embeddings, out_dtype=parts.out_dtype)
            for folder in self.folders
        )
        if any(each.grown for each in aligned) and (parts.patch is not None or len(aligned) > 1):
            raise ConfigError("embeddings=keep_finetuned_rows: neither a patch nor stitching can hold the added rows")
        return aligned

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All tensors in scope that fine-tuning changed."""
        names: dict[str, None] = {}
        for each in self.aligned:
            changed = changed_tensors(each.pretrained, each.finetuned, self.scope)
            require_precision(each.pretrained, each.finetuned, changed)
            names |= dict.fromkeys(changed)
        return tuple(names)

    @cached_property
    def scope(self) -> tuple[str, ...] | None:
        return None if self.parts.scope is None else select(self.aligned[0].pretrained, self.parts.scope)

    @cached_property
    def adapter(self) -> Adapter:
        return self.parts.adapter or adapter_of(self.parts.pretrained)

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        return tuple(map(device_of, self.parts.devices))

    def _merged(self, adapters: Path) -> Path:
        base = self.parts.pretrained

        def make(out: Path) -> None:
            merge_lora(base, adapters, out / CHECKPOINT)

        inputs = {"base": self._fingerprint(base), "adapters": self._fingerprint(adapters), "peft": version("peft")}
        return self.builds.build("merged_lora", inputs, [merge_lora.__module__], make).folder / CHECKPOINT

    def _streamed(self) -> Stream:
        with advancing("fuse") as progress:
            yield from fused_tensors(*self._pair, self.parts.method, progress=progress, **self._settings())

    def _as_patch(self) -> Outcome:
        with advancing("fuse") as progress:
            patch, report = fuse_to_patch(*self._pair, self.parts.method, progress=progress, **self._settings())
        return Outcome(self._named(patch), [row for row in report.tensors if row.fate == "fused"])

    @property
    def _pair(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        return self.aligned[0].pretrained, self.aligned[0].finetuned

    def _settings(self) -> dict[str, Any]:
        return {
            "scope": self.scope,
            "changed": self.names,
            "evidence": self._target(),
            "seed": self.parts.seed,
            "device": self.devices[0],
        }

    def _target(self) -> Evidence:
        if self.parts.method.needs == "nothing":
            return None
        calibration = self.parts.calibration
        placement = Placement(self.devices[0])
        samples, held_out = self._samples(0)
        kinds = {(sample.image is None, sample.answer is None) for sample in [*samples, *held_out]}
        if len(kinds) > 1 or any(without_answer for _, without_answer in kinds):
            raise ConfigError(
                "calibration.data: a baseline that learns from the target loss needs an answer in every sample, and an "
                "image in all or in none"
            )
        loaded = self.adapter.load(self.parts.pretrained, torch.float32, placement)
        return TargetLoss(self.adapter, loaded, samples, held_out, calibration.batch_size)

    def _in_shares(self) -> Outcome:
        parts, calibration, method = self.parts, self.parts.calibration, self.parts.method
        base, tuned = self.aligned[0].pretrained, [each.finetuned for each in self.aligned]

        def fuse(
            names: Sequence[str], evidence: Sequence[GramEvidence], device: torch.device
        ) -> tuple[Patch, FusionReport]:
            some, finetuned = Only(base, names), [Only(weights, names) for weights in tuned]
            if isinstance(method, Stitched):
                return method.stitch(some, finetuned, evidence=evidence, seed=parts.seed, device=device)
            return fuse_to_patch(some, finetuned[0], method, evidence=evidence[0], seed=parts.seed, device=device)

        shares = Shares(
            builds=self.builds,
            names=self.names,
            tasks=[self._sources(number) for number in range(len(self.folders))],
            retain=self._retain(),
            devices=self.devices,
            memory_bytes=int(calibration.memory_gb * 1e9),
            is_separable=is_separable(method),
            fuse=fuse,
            inputs={
                "method": identity(method),
                "pretrained": self._fingerprint(parts.pretrained),
                "finetuned": [self._fingerprint(folder) for folder in self.folders],
                "out_dtype": parts.out_dtype,
                "scope": self.names if calibration.inputs == "sequential" else None,
                "seed": parts.seed,
            },
            modules=[module_of(method), fuse_to_patch.__module__, Only.__module__],
        )
        is_sequential = calibration.inputs == "sequential"
        fused = shares.sequential(self._for_model, self._outside) if is_sequential else shares.from_finetuned()
        return Outcome(self._named(fused.patch), fused.rows)

    def _for_model(self, patch: Patch) -> Iterator[tuple[str, Tensor]]:
        """The fused tensors of a patch, in the layout of the fine-tuned model."""
        each = self.aligned[0]
        return ((name, each.complete(name, tensor)) for name, tensor in patch.apply_to(each.pretrained))

    def _outside(self) -> Iterator[tuple[str, Tensor]]:
        """What fine-tuning changed outside the scope, as the result has it: pretrained."""
        each = self.aligned[0]
        changed = () if self.scope is None else changed_tensors(each.pretrained, each.finetuned)
        return ((name, each.complete(name, each.pretrained[name])) for name in changed if name not in self.names)

    def _fingerprint(self, folder: Path) -> str:
        return fingerprint(folder, self.parts.home)

    def _model(self, folder: Path) -> Model:
        parts = self.parts
        placement = Placement(self.devices[0], parts.device_map, parts.home / "offload")
        dtype = parts.dtype if parts.dtype == "auto" else getattr(torch, parts.dtype)
        return Model(self.adapter, folder, self._fingerprint(folder), dtype, placement)

    def _sources(self, number: int) -> TaskSources:
        model, size = self._model(self.folders[number]), self.parts.calibration.batch_size
        samples, held_out = self._samples(number)
        suffix = f" {number + 1}" if len(self.folders) > 1 else ""
        return TaskSources(
            Source(f"samples{suffix}", model, samples, size, self.builds),
            Source(f"held out{suffix}", model, held_out, size, self.builds) if held_out else None,
        )

    def _retain(self) -> Source | None:
        parts, calibration = self.parts, self.parts.calibration
        if not sees_old_tasks(parts.method):
            if calibration.retain is not None:
                raise ConfigError("calibration.retain: this baseline uses no samples of old tasks; leave it out")
            return None
        if calibration.retain is None:
            raise ConfigError("calibration.retain: this baseline needs samples of old tasks; name a file or a task")
        samples, _ = drawn(calibration.retain, calibration.samples, 0, parts.seed, self.adapter, "calibration.retain")
        return Source("retain", self._model(parts.pretrained), samples, calibration.batch_size, self.builds)

    def _samples(self, number: int) -> tuple[list[Sample], list[Sample]]:
        calibration = self.parts.calibration
        data = [calibration.data] if isinstance(calibration.data, str | None) else list(calibration.data)
        if len(data) != len(self.folders) or data[number] is None:
            raise ConfigError(
                f"calibration.data={calibration.data}: this baseline needs samples of the target task, a JSON Lines "
                f"file or a configured task for each fine-tuned model ({len(self.folders)})"
            )
        return drawn(
            data[number],
            calibration.samples,
            calibration.held_out,
            self.parts.seed,
            self.adapter,
            "calibration.data",
        )

    def _named(self, patch: Patch) -> Patch:
        """The patch with the names of the checkpoints, which the shares did not know."""
        names = {"base": self.parts.pretrained.resolve().name}
        if "tasks" in patch.header:
            names["tasks"] = sorted(folder.resolve().name for folder in self.parts.finetuned)
        return Patch(patch.tensors, {**patch.header, **names})

    def _patched(self, fused: Outcome) -> Stream:
        """All tensors of the checkpoint, those of the patch with it, and their rows of the report."""
        base, scope = self.aligned[0].pretrained, frozenset(self.scope or ())
        rows = {row.name: row for row in fused.rows}
        for name, tensor in fused.patch.applied(base).items():
            fate: Fate = "kept" if name in scope else "copied"
            yield name, tensor, rows.get(name, TensorReport(name, tuple(tensor.shape), fate))


def tell(report: FusionReport, parts: Fusing) -> None:
    """Says what was done, and warns of chosen entries that rounding took back."""
    totals = report.totals
    counts = ", ".join(f"{count} {fate}" for fate, count in totals["tensor_counts"].items() if count)
    log.info(
        "%s: %s tensors; %s entries changed, %.2f %% of those in scope",
        report.method,
        counts,
        f"{totals['changed_count']:,}",
        100 * totals["changed_fraction"],
    )
    lost = totals["mask_count"] - totals["changed_count"]
    if lost > totals["mask_count"] / 10:
        log.warning(
            "%s of %s chosen entries are what they were: fine-tuning left them, or rounding did",
            f"{lost:,}",
            f"{totals['mask_count']:,}",
        )
    for target in (parts.out, parts.patch):
        if target is not None:
            log.info("wrote %s", target)
