"""The plan of a calibration: which linear layers read one input, and in what order a forward pass meets them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from experiments.errors import ModelError
from experiments.models.adapter import Adapter, Batch, Loaded, Sample
from tailor.errors import EmptyCalibration

Group = tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Distinct inputs in the order in which a forward pass meets them.

    ``layers``: each input's key (the name of the first layer that reads it) → all layers that read it. ``widths``: key
    → entries of a token. ``is_called_once``: whether a forward pass calls each layer a single time.
    """

    layers: Mapping[str, Group]
    widths: Mapping[str, int]
    is_called_once: bool

    def groups(self, memory_bytes: int) -> list[Group]:
        """Keys in order, cut so that each group's float32 Grams take ``memory_bytes`` at most, or are one alone."""
        groups: list[list[str]] = [[]]
        used = 0
        for key, width in self.widths.items():
            size = 4 * width * width
            if groups[-1] and used + size > memory_bytes:
                groups.append([])
                used = 0
            groups[-1].append(key)
            used += size
        return [tuple(group) for group in groups if group]

    def to_json(self) -> dict[str, Any]:
        """A plain dict of JSON types; its lists keep the order."""
        inputs = [{"key": key, "width": width, "layers": list(self.layers[key])} for key, width in self.widths.items()]
        return {"inputs": inputs, "is_called_once": self.is_called_once}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        layers = {each["key"]: tuple(each["layers"]) for each in stored["inputs"]}
        return cls(layers, {each["key"]: each["width"] for each in stored["inputs"]}, stored["is_called_once"])

    def readers(self, keys: Group) -> dict[str, str]:
        """Layer → key, for all layers that read one of these inputs."""
        return {layer: key for key in keys for layer in self.layers[key]}


def make_plan(adapter: Adapter, loaded: Loaded, samples: Sequence[Sample], layers: Collection[str]) -> Plan:
    """Finds out by running single samples, those with an image first, until each linear layer among ``layers`` was met.

    Raises EmptyCalibration naming the layers that no sample reaches.
    """
    modules = linear_modules(loaded, layers)
    first_seen: dict[str, list[str]] = {}  # key → layers
    widths: dict[str, int] = {}
    calls: dict[str, int] = dict.fromkeys(modules, 0)
    seen: dict[int, tuple[str, Tensor]] = {}  # inputs are kept, so that no later tensor can take their identity

    def observe(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs = arguments[0]
        calls[name] += 1
        if any(name in group for group in first_seen.values()):
            return
        key, _ = seen.setdefault(id(inputs), (name, inputs))
        first_seen.setdefault(key, []).append(name)
        widths.setdefault(key, inputs.shape[-1])

    most_calls = 0
    handles = [module.register_forward_pre_hook(partial(observe, name)) for name, module in modules.items()]
    with removed_after(handles), torch.no_grad():
        for sample in sorted(samples, key=lambda sample: sample.image is None):
            calls.update(dict.fromkeys(calls, 0))
            seen.clear()
            run_batch(loaded, adapter.training_batch(loaded.processor, [sample]))
            most_calls = max([most_calls, *calls.values()])
            missing = sorted(set(modules) - {name for group in first_seen.values() for name in group})
            if not missing:
                break
        else:
            if modules:
                raise EmptyCalibration(
                    f"{', '.join(missing[:4])}: no calibration token reached {'it' if len(missing) == 1 else 'them'} "
                    f"({len(missing)} of {len(modules)} layers); check the scope or the calibration samples"
                )
    return Plan({key: tuple(group) for key, group in first_seen.items()}, widths, most_calls <= 1)


def linear_modules(loaded: Loaded, layers: Collection[str]) -> dict[str, nn.Linear]:
    """Those of ``layers`` that are weights of linear layers, with their modules."""
    paths = {tensor: path for path, tensor in loaded.tensor_names.items()}
    if strange := sorted(name for name in layers if name not in paths):
        raise ModelError(
            f"{', '.join(strange[:4])}: {type(loaded.model).__name__} has no such parameter ({len(strange)} of "
            f"{len(layers)} tensors); leave them out by a scope, or correct the checkpoint's config"
        )
    owners = {name: loaded.model.get_submodule(paths[name].rpartition(".")[0]) for name in layers}
    return {
        name: module
        for name, module in owners.items()
        if isinstance(module, nn.Linear) and paths[name].endswith(".weight")
    }


def run_batch(loaded: Loaded, batch: Batch) -> None:
    """A forward pass of a training batch, without loss and cache."""
    inputs = {name: tensor.to(loaded.device) for name, tensor in batch.items() if name != "labels"}
    loaded.model(**inputs, use_cache=False)


@contextmanager
def removed_after(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that last as long as the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
