"""Grams of a model's linear layers: passes of samples to sum them.

By a plan (`experiments.stages.plan`), layers are calibrated in groups whose Grams fit into memory, or, if weights
change on the way, one distinct input after the other. A later pass starts from a block's outputs that an earlier one
kept, so that the blocks of a language model run about once over all passes together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.errors import ModelError
from experiments.models.adapter import Adapter, Batch, Loaded, Sample
from experiments.stages.plan import Group, Plan, linear_modules, make_plan, removed_after, run_batch
from tailor.gram import GramAccumulator, Grams


def collect_grams(
    adapter: Adapter, loaded: Loaded, samples: Sequence[Sample], layers: Collection[str], batch_size: int, desc: str
) -> Grams:
    """Undamped Grams of the linear layers among ``layers`` (checkpoint tensor names) over ``samples``, in one pass.

    Layers that read the same tensor share one Gram. Tensors that are no linear weight are passed over: they have none.
    Raises EmptyCalibration if no token reaches a layer, NotFinite if an input is.
    """
    plan = make_plan(adapter, loaded, samples, layers)
    return Passes(adapter, loaded, samples, batch_size, plan).collect(tuple(plan.widths), desc)


class _Stop(Exception):  # noqa: N818 - it is no error
    """Everything that a pass is for has been seen: the rest of the forward pass would be wasted."""


class _Block(NamedTuple):
    """A block by its place in a list of blocks, such as a language model's layers."""

    blocks: nn.ModuleList
    index: int

    @property
    def module(self) -> nn.Module:
        return self.blocks[self.index]


@dataclass
class Passes:
    """Passes of the same samples through the same model, group after group of a plan, in its order.

    With ``weights_change``, weights of layers that were collected may be set anew between passes.
    """

    adapter: Adapter
    loaded: Loaded
    samples: Sequence[Sample]
    batch_size: int
    plan: Plan
    weights_change: bool = False
    _kept: tuple[_Block, list[Tensor]] | None = field(default=None, init=False)  # a block's outputs, batch by batch

    @torch.no_grad()
    def collect(self, keys: Group, desc: str, upcoming: Group = ()) -> Grams:
        """Undamped Grams of all layers that read the inputs ``keys``; ``upcoming`` are those of the next call."""
        if not keys:
            return Grams({}, {}, {})
        batches = self._batches()
        if self._kept is not None and not self._replays_rightly(keys, batches[0]):
            self._kept = None
        # What was fused up to here is final, so the outputs just before these layers are. If no weight changes, those
        # before the next group's layers are as well.
        watch = _Watch(self, keys, self._block_before(keys if self.weights_change else upcoming))
        with self._replayed() as begin_replay, watch.hooked():
            for number, samples in enumerate(tqdm(batches, desc=desc, leave=False, dynamic_ncols=True, disable=None)):
                batch = self.adapter.training_batch(self.loaded.processor, samples)
                begin_replay(number)
                watch.begin(batch)
                with suppress(_Stop):
                    run_batch(self.loaded, batch)
        if len(watch.kept) == len(batches):
            self._kept = watch.kept_block, watch.kept
        return Grams.collect(watch.keys_of_layers, watch.accumulators)

    def _batches(self) -> list[Sequence[Sample]]:
        """Batches of samples that all have an image, then of those that have none."""
        kinds = (
            [sample for sample in self.samples if sample.image is not None],
            [sample for sample in self.samples if sample.image is None],
        )
        size = self.batch_size
        return [kind[start : start + size] for kind in kinds for start in range(0, len(kind), size)]

    def _block(self, key: str) -> _Block | None:
        """The innermost block that holds the layer ``key``."""
        path = next(path for path, tensor in self.loaded.tensor_names.items() if tensor == key)
        parts = path.split(".")
        for length in range(len(parts) - 1, 0, -1):
            parent = self.loaded.model.get_submodule(".".join(parts[: length - 1]))
            if isinstance(parent, nn.ModuleList):
                return _Block(parent, int(parts[length - 1]))
        return None

    def _block_before(self, keys: Group) -> _Block | None:
        """The block before that of the first of these layers, if it can be replayed and is not kept yet."""
        if not keys or not self.plan.is_called_once or (place := self._block(keys[0])) is None or place.index == 0:
            return None
        before = _Block(place.blocks, place.index - 1)
        return None if self._kept is not None and self._kept[0] == before else before

    def _replays_rightly(self, keys: Group, samples: Sequence[Sample]) -> bool:
        """Whether these layers read the same, to the bit, from what was kept as from the whole model.

        They do not where something else than the next block reads a block's outputs, or what it leaves behind.
        """
        batch = self.adapter.training_batch(self.loaded.processor, samples)
        expected = self._inputs_of(keys, batch)
        try:
            with self._replayed() as begin:
                begin(0)
                found = self._inputs_of(keys, batch)
        except (KeyError, IndexError, RuntimeError, TypeError, AttributeError, ValueError):
            return False
        return expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)

    def _inputs_of(self, keys: Group, batch: Batch) -> dict[str, Tensor]:
        """What the layers read in a forward pass, up to the last of them."""
        inputs: dict[str, Tensor] = {}

        def observe(key: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs[key] = arguments[0]
            if key == keys[-1] and self.plan.is_called_once:
                raise _Stop

        modules = linear_modules(self.loaded, keys)
        handles = [module.register_forward_pre_hook(partial(observe, key)) for key, module in modules.items()]
        with removed_after(handles), suppress(_Stop):
            run_batch(self.loaded, batch)
        return inputs

    @contextmanager
    def _replayed(self) -> Iterator[Callable[[int], None]]:
        """While it lasts, blocks up to the kept one pass on what they get, and that one what was kept.

        Yields a function to call with each batch's number.
        """
        current = 0

        def begin(batch: int) -> None:
            nonlocal current
            current = batch

        def pass_on(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden

        def replay(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            assert self._kept is not None
            return self._kept[1][current].to(hidden.device)

        with ExitStack() as stack:
            if self._kept is not None:
                block, _ = self._kept
                for module in block.blocks[: block.index]:
                    stack.enter_context(_replaced_forward(module, pass_on))
                stack.enter_context(_replaced_forward(block.module, replay))
            yield begin


class _Watch:
    """Hooks of one pass. Adds each distinct input to its Gram, once a batch, under its layer's own mask of tokens."""

    def __init__(self, passes: Passes, keys: Group, kept_block: _Block | None) -> None:
        self.keys_of_layers = passes.plan.readers(keys)
        self.accumulators = {key: GramAccumulator(key) for key in keys}
        self.kept_block, self.kept = kept_block, list[Tensor]()
        self._adapter = passes.adapter
        self._modules = linear_modules(passes.loaded, self.keys_of_layers)
        self._paths = {tensor: path.rpartition(".")[0] for path, tensor in passes.loaded.tensor_names.items()}
        self._last = keys[-1] if passes.plan.is_called_once else None
        self._keeps = kept_block is not None
        self._waits = False
        self._batch: Batch = {}
        self._inputs: dict[str, Tensor] = {}

    def begin(self, batch: Batch) -> None:
        self._batch, self._inputs, self._waits = batch, {}, self._keeps

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(partial(self._add, name)) for name, module in self._modules.items()]
        if self.kept_block is not None:
            handles.append(self.kept_block.module.register_forward_hook(self._keep))
        with removed_after(handles):
            yield

    def _add(self, name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs, key = arguments[0], self.keys_of_layers[name]
        if key not in self._inputs:
            if name != key:
                raise ModelError(f"{name}: reads the input of {key} in one sample, but not in another")
            self._inputs[key] = inputs  # kept until the batch is over, so that no later tensor can take its identity
            mask = self._adapter.token_mask(self._paths[name], self._batch)
            if mask is not None and mask.ndim + 1 > inputs.ndim and mask.numel() == inputs[..., 0].numel():
                mask = mask.reshape(inputs.shape[:-1])  # layers that get all sequences' tokens in one row
            self.accumulators[key].add(inputs, mask)
        elif self._inputs[key] is not inputs:
            raise ModelError(f"{name}: shared its input with {key} in one sample, but not in another")
        self._stop_if_done()

    def _keep(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        inputs = arguments[0] if arguments else None
        # Else a block can't be replayed, and later passes run the whole model.
        self._keeps &= isinstance(inputs, Tensor) and isinstance(output, Tensor) and inputs.shape == output.shape
        if self._keeps:
            self.kept.append(output.cpu())
        self._waits = False
        self._stop_if_done()

    def _stop_if_done(self) -> None:
        if self._last in self._inputs and not self._waits:
            raise _Stop


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate sets one on the module itself
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
