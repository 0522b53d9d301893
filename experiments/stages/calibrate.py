"""Calibration: one pass of target samples through the fine-tuned model collects the Gram of every linear layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments import checks
from experiments.errors import ConfigError, ModelError
from experiments.models.adapter import Adapter, Batch, Loaded, Sample
from tailor.gram import GramAccumulator, Grams


@dataclass(frozen=True)
class Calibration:
    """``samples``: training sequences that the Grams are taken over; ``held_out``: development ones for the report.

    ``retain`` says whose samples stand for the old tasks (`experiments.stages.retain`), for methods that see such, and
    ``retain_samples`` how many. ``damping`` and ``compare_decorators`` are for the methods that use the Grams
    (`tailor.methods.tailor.Tailor`).
    """

    samples: int
    held_out: int
    batch_size: int
    retain: str
    retain_samples: int
    damping: float
    compare_decorators: bool

    def __post_init__(self) -> None:
        checks.whole(self, "samples", "held_out", "batch_size", "retain_samples")
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


def collect_grams(
    adapter: Adapter, loaded: Loaded, samples: Sequence[Sample], layers: Collection[str], batch_size: int, desc: str
) -> Grams:
    """Undamped Grams of the linear layers among ``layers`` (checkpoint tensor names) over ``samples``.

    Layers that read the same tensor share one Gram. Tensors that are no linear weight are passed over: they have none.
    Raises EmptyCalibration if no token reaches a layer, NotFinite if an input is.
    """
    paths = {tensor: path for path, tensor in loaded.tensor_names.items()}
    modules = {
        name: (module_path, module)
        for name in layers
        for module_path, module in [_owner(loaded.model, paths[name])]
        if isinstance(module, nn.Linear) and paths[name].endswith(".weight")
    }
    collector = _Collector(adapter, {name: path for name, (path, _) in modules.items()})
    with collector.watching({name: module for name, (_, module) in modules.items()}), torch.no_grad():
        starts = range(0, len(samples), batch_size)
        for start in tqdm(starts, desc=desc, leave=False, dynamic_ncols=True, disable=None):
            batch = adapter.training_batch(loaded.processor, samples[start : start + batch_size])
            batch = {name: tensor.to(loaded.model.device) for name, tensor in batch.items()}
            collector.begin(batch)
            loaded.model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    return Grams.collect(collector.keys, collector.accumulators)


def _owner(model: nn.Module, parameter_path: str) -> tuple[str, nn.Module]:
    path = parameter_path.rpartition(".")[0]
    return path, model.get_submodule(path)


class _Collector:
    """Sums each distinct input once; ``keys`` says for every layer under which layer's name its Gram is kept."""

    def __init__(self, adapter: Adapter, module_paths: dict[str, str]) -> None:
        self.keys: dict[str, str] = {name: name for name in module_paths}
        self.accumulators: dict[str, GramAccumulator] = {name: GramAccumulator(name) for name in module_paths}
        self._adapter = adapter
        self._paths = module_paths
        self._batch: Batch = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._first_batch = True

    def begin(self, batch: Batch) -> None:
        self._first_batch = not self._batch
        self._batch = batch
        self._seen = {}

    @contextmanager
    def watching(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(partial(self._observe, name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _observe(self, name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs = arguments[0]
        if self._first_batch and id(inputs) in self._seen:
            self.keys[name] = self._seen[id(inputs)][0]
        if self.keys[name] != name:
            shared = self._seen.get(id(inputs))
            if shared is None or shared[0] != self.keys[name]:
                raise ModelError(f"{name}: shared its input with {self.keys[name]} in the first batch, but not now")
            return
        # Kept until the batch is over, so that no later tensor can take its identity.
        self._seen[id(inputs)] = (name, inputs)
        mask = self._adapter.token_mask(self._paths[name], self._batch)
        self.accumulators[name].add(inputs, mask)
