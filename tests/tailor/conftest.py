"""Small layers, models and checkpoint folders for the tests of the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tailor.gram import GramAccumulator, Grams
from tailor.method import GramEvidence
from tests.checkpoints import write_folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Layer:
    """A random layer: heavy-tailed delta (out, in), correlated inputs (tokens, in), their Gram damped by 1 %."""

    delta: Tensor
    inputs: Tensor
    gram: Tensor


@pytest.fixture
def make_layer() -> Callable[..., Layer]:
    def make(seed: int, outputs: int = 24, inputs: int = 40, tokens: int = 200) -> Layer:
        torch.manual_seed(seed)
        mixing = torch.randn(inputs, inputs) * torch.arange(1, inputs + 1) ** -0.7
        rows = torch.randn(tokens, inputs) @ mixing.T
        rows[:, seed % inputs] *= 10  # an outlier channel
        delta = torch.distributions.StudentT(3.0).sample((outputs, inputs)) * 1e-2
        accumulator = GramAccumulator()
        accumulator.add(rows)
        return Layer(delta, rows, accumulator.finish(damping=0.01))

    return make


@dataclass(frozen=True)
class Model:
    """A toy model before and after fine-tuning, with Grams of its two linear layers."""

    pretrained: dict[str, Tensor]
    finetuned: dict[str, Tensor]
    evidence: GramEvidence


@pytest.fixture
def make_model() -> Callable[..., Model]:
    def make(dtype: torch.dtype = torch.float32, tuned_dtype: torch.dtype | None = None, seed: int = 0) -> Model:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        pretrained = {
            "embed.weight": random(7, 6),
            "first.weight": random(10, 6),
            "first.bias": random(10),
            "norm.weight": random(6),
            "second.weight": random(3, 10),
            "second.bias": random(3),
            "frozen.weight": random(4, 4),
        }
        pretrained = {name: tensor.to(dtype) for name, tensor in pretrained.items()}
        finetuned = {
            name: (tensor.float() + (0 if name.startswith("frozen") else 0.1) * random(*tensor.shape)).to(
                tuned_dtype or dtype
            )
            for name, tensor in pretrained.items()
        }
        pretrained["position_ids"] = finetuned["position_ids"] = torch.arange(5)

        def grams(tokens: int) -> Grams:
            sums = {"first": GramAccumulator(), "second": GramAccumulator()}
            sums["first"].add(random(tokens, 6) @ random(6, 6))
            sums["second"].add(random(tokens, 10) @ random(10, 10))
            return Grams.collect({f"{layer}.weight": layer for layer in sums}, sums)

        return Model(pretrained, finetuned, GramEvidence(grams(50), grams(20)))

    return make


@pytest.fixture
def write_checkpoint() -> Callable[..., Path]:
    """Write tensors as a checkpoint folder of so many shards, without the library's own writer."""
    return write_folder
