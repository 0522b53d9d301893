"""Fusing with Grams, a share of the tensors at a time: memory holds some layers, never all of a model's.

Each group of Grams and each share's patch is an artifact, so a fusion that was interrupted goes on, and another setting
of the method starts from the Grams that are there. Shares are disjoint scopes, and their patches stack.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.artifacts import Artifact, canonical
from experiments.data import identity, module_of
from experiments.models.adapter import Adapter, Loaded, Placement, Sample
from experiments.runs import Builds
from experiments.stages.fuse import PATCH
from experiments.stages.grams import Passes
from experiments.stages.plan import Group, Plan, make_plan
from tailor.gram import Grams
from tailor.method import GramEvidence
from tailor.patch import Patch
from tailor.report import FusionReport, TensorReport

GRAMS = "grams.safetensors"
PLAN = "plan.json"
ROWS = "rows.json"

FuseShare = Callable[[Sequence[str], Sequence[GramEvidence], torch.device], tuple[Patch, FusionReport]]


@dataclass
class Model:
    """A checkpoint that samples are run through, loaded when first needed. ``fingerprint`` identifies its files."""

    adapter: Adapter
    folder: Path
    fingerprint: str
    dtype: torch.dtype | str
    placement: Placement
    _loaded: Loaded | None = field(default=None, init=False)
    _pending: list[Callable[[], Iterable[tuple[str, Tensor]]]] = field(default_factory=list, init=False)

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None:
            self._loaded = self.adapter.load(self.folder, self.dtype, self.placement)
            for weights in self._pending:
                self._loaded.set_weights(weights())
        return self._loaded

    def set_weights(self, weights: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """From now on: (checkpoint tensor name, weight), asked for only when the model is there."""
        self._pending.append(weights)
        if self._loaded is not None:
            self._loaded.set_weights(weights())

    def release(self) -> None:
        """Frees the memory of the model."""
        self._loaded = None


class Source:
    """Samples and the model that they are run through: what Grams are taken from, group by group."""

    def __init__(self, name: str, model: Model, samples: Sequence[Sample], batch_size: int, builds: Builds) -> None:
        self.name, self.model, self.samples, self.batch_size = name, model, samples, batch_size
        self._builds = builds
        self._inputs = {
            "weights": model.fingerprint,
            "adapter": identity(model.adapter),
            "samples": _digest(samples),
            "batch_size": batch_size,
            "dtype": str(model.dtype),
            "device": str(model.placement.device),
            "device_map": model.placement.device_map,
        }
        self._modules = [Passes.__module__, module_of(model.adapter)]
        self._passes: Passes | None = None

    def plan(self, layers: Sequence[str]) -> Plan:
        """The plan of the linear layers among ``layers``."""

        def make(out: Path) -> None:
            plan = make_plan(self.model.adapter, self.model.loaded, self.samples, layers)
            (out / PLAN).write_text(json.dumps(plan.to_json()) + "\n")

        artifact = self._builds.build("plans", {**self._inputs, "layers": sorted(layers)}, self._modules, make)
        return Plan.from_json(json.loads((artifact.folder / PLAN).read_text()))

    def grams(self, plan: Plan, keys: Group, upcoming: Group = (), after: str | None = None) -> Artifact:
        """Grams of the layers that read the inputs ``keys``; ``upcoming`` are those of the next call.

        ``after`` identifies what set the model's weights anew, if anything did.
        """
        label = f"grams ({self.name}) of {keys[0]}" + (f" and {len(keys) - 1} more inputs" if len(keys) > 1 else "")

        def make(out: Path) -> None:
            if self._passes is None:
                model = self.model
                self._passes = Passes(
                    model.adapter, model.loaded, self.samples, self.batch_size, plan, weights_change=after is not None
                )
            self._passes.collect(keys, f"calibrate ({self.name})", upcoming).save(out / GRAMS)

        inputs = {**self._inputs, "layers": plan.readers(keys), "after": after}
        return self._builds.build("gram_groups", inputs, self._modules, make, label)

    def release(self) -> None:
        """Frees the memory of the model and of what its passes kept."""
        self._passes = None
        self.model.release()


@dataclass(frozen=True)
class TaskSources:
    """Where the Grams that one fine-tuned model brings to a fusion come from."""

    calibration: Source
    held_out: Source | None

    def __iter__(self) -> Iterator[Source]:
        return (source for source in (self.calibration, self.held_out) if source is not None)


@dataclass(frozen=True)
class Shares:
    """A fusion in shares.

    ``names``: all tensors that it changes. ``fuse`` fuses some of them, given one evidence a task; what it does is
    decided by ``inputs`` and the code of ``modules``. ``memory_bytes`` bounds the Grams that calibration holds at once.
    """

    builds: Builds
    names: Sequence[str]
    tasks: Sequence[TaskSources]
    retain: Source | None
    devices: Sequence[torch.device]
    memory_bytes: int
    is_separable: bool
    fuse: FuseShare
    inputs: Mapping[str, Any]
    modules: Sequence[str]

    @cached_property
    def plan(self) -> Plan:
        return self.tasks[0].calibration.plan(self.names)

    def from_finetuned(self) -> Outcome:
        """Layers read what the fine-tuned models make of the samples: Grams first, then shares on all devices."""
        groups = self.plan.groups(self.memory_bytes)
        sources = [source for task in self.tasks for source in task]
        if self.retain is not None:
            sources.append(self.retain)
        grams, keys = {}, []
        for source in sources:
            following = (*groups[1:], ())[: len(groups)]
            made = [source.grams(self.plan, group, after) for group, after in zip(groups, following, strict=True)]
            source.release()
            grams[source] = Grams.joined([_grams(artifact) for artifact in made])
            keys += [artifact.key for artifact in made]
        evidence = [self._evidence(task, grams, is_share=self.is_separable) for task in self.tasks]
        if not self.is_separable:
            return self._merged([self._share(self.names, evidence, keys, self.devices[0])])

        free = SimpleQueue[torch.device]()
        for device in self.devices:
            free.put(device)

        def share(names: Sequence[str]) -> Artifact:
            device = free.get()
            try:
                return self._share(names, evidence, keys, device)
            finally:
                free.put(device)

        layers = [list(self.plan.readers(group)) for group in groups]
        parts = [part[start :: len(self.devices)] for part in layers for start in range(len(self.devices))]
        with ThreadPoolExecutor(len(self.devices)) as pool:
            return self._merged(list(pool.map(share, [part for part in [self._without_gram, *parts] if part])))

    def sequential(
        self,
        whole: Callable[[Patch], Iterable[tuple[str, Tensor]]],
        reset: Callable[[], Iterable[tuple[str, Tensor]]] = tuple,
    ) -> Outcome:
        """Each layer reads what the layers below it, fused already, make of the samples; for a single task.

        ``whole`` gives a patch's whole tensors for the model, ``reset`` those outside the scope as the result has them.
        """
        (task,) = self.tasks
        task.calibration.model.set_weights(reset)
        groups = [(key,) for key in self.plan.widths]
        retained = [self.retain.grams(self.plan, group) for group in groups] if self.retain is not None else []
        if self.retain is not None:
            self.retain.release()
        nothing = Grams({}, {}, {})
        first = GramEvidence(nothing, retain=None if self.retain is None else nothing, is_share=True)
        shares = [self._share(self._without_gram, [first], [], self.devices[0])]
        for number, group in enumerate(groups):
            task.calibration.model.set_weights(partial(self._weights, whole, shares[-1]))
            made = {source: source.grams(self.plan, group, after=shares[-1].key) for source in task}
            if self.retain is not None:
                made[self.retain] = retained[number]
            evidence = self._evidence(task, {source: _grams(artifact) for source, artifact in made.items()}, True)
            keys = [shares[-1].key, *(artifact.key for artifact in made.values())]
            shares.append(self._share(list(self.plan.readers(group)), [evidence], keys, self.devices[0]))
        for source in task:
            source.release()
        return self._merged(shares)

    @staticmethod
    def _weights(
        whole: Callable[[Patch], Iterable[tuple[str, Tensor]]], share: Artifact
    ) -> Iterable[tuple[str, Tensor]]:
        return whole(Patch.load(share.folder / PATCH))

    @property
    def _without_gram(self) -> list[str]:
        with_gram = self.plan.readers(tuple(self.plan.widths))
        return [name for name in self.names if name not in with_gram]

    def _evidence(self, task: TaskSources, grams: Mapping[Source, Grams], is_share: bool) -> GramEvidence:
        held_out = None if task.held_out is None else grams[task.held_out]
        retain = None if self.retain is None else grams[self.retain]
        return GramEvidence(grams[task.calibration], held_out, retain, is_share)

    def _share(
        self, names: Sequence[str], evidence: Sequence[GramEvidence], keys: Sequence[str], device: torch.device
    ) -> Artifact:
        def make(out: Path) -> None:
            patch, report = self.fuse(names, evidence, device)
            patch.save(out / PATCH)
            (out / ROWS).write_text(json.dumps([asdict(row) for row in report.tensors]) + "\n")

        inputs = {**self.inputs, "names": list(names), "grams": list(keys), "device": str(device)}
        label = f"fused {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "fused"
        return self.builds.build("shares", inputs, self.modules, make, label)

    @staticmethod
    def _merged(shares: Sequence[Artifact]) -> Outcome:
        if not shares:
            return Outcome(Patch({}, {}), [])
        patches = [Patch.load(share.folder / PATCH) for share in shares]
        rows = [
            TensorReport(**{**row, "shape": tuple(row["shape"])})
            for share in shares
            for row in json.loads((share.folder / ROWS).read_text())
        ]
        tensors = {name: tensor for patch in patches for name, tensor in patch.tensors.items()}
        return Outcome(Patch(tensors, patches[0].header), rows)


class Outcome(NamedTuple):
    """The patch of all shares, and the report's rows of the tensors that they fused."""

    patch: Patch
    rows: list[TensorReport]


def _grams(artifact: Artifact) -> Grams:
    return Grams.load(artifact.folder / GRAMS)


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        image = sample.image
        described = None if image is None else [image.size, image.mode, hashlib.sha256(image.tobytes()).hexdigest()]
        digest.update(canonical([described, sample.prompt, sample.answer]))
    return digest.hexdigest()
