"""What a fusion takes: operations, memory and bytes from shapes alone, and seconds at this machine's measured rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from tailor.support import solve_on_support

FLOAT32 = 4
# Beside a layer's two stored versions: delta, score, mask, right-hand sides, solution and their sums, in float32.
LAYER_COPIES = 8
GRAM_COPIES = 4  # as stored, damped, its factor, and the factor's inverse
# How often memory is gone through: a Gram as it is summed, finished, checked and written, a layer as it is scored,
# ranked, masked, decorated, rounded, compared and made into a patch.
GRAM_VISITS, LAYER_VISITS = 12, 60


@dataclass(frozen=True)
class Rates:
    """Operations a second in products of large matrices and in solving on supports, and bytes a second in copying."""

    large: float
    support: float
    copied: float


@dataclass(frozen=True)
class Layer:
    """A linear weight, (out, in)."""

    rows: int
    width: int


@dataclass(frozen=True)
class Cost:
    """Seconds of calibrating and of fusing, and the most memory that either holds, in bytes, without the model."""

    calibrating: float
    fusing: float
    memory: int

    @property
    def seconds(self) -> float:
        return self.calibrating + self.fusing


def measure(device: torch.device, size: int = 1024) -> Rates:
    """This machine's rates, in about a second: a product, a solve on supports of a tenth, and a copy of 64 MB."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(size, size, generator=generator).to(device)
    gram = factor @ factor.T / size + torch.eye(size, device=device)
    mask = (torch.rand(size, size, generator=generator) < 0.1).to(device)
    large = 2 * size**3 / _seconds(lambda: factor @ factor, device)
    support = support_operations(Layer(size, size), 0.1) / _seconds(
        lambda: solve_on_support(gram, factor, mask), device
    )
    memory = torch.zeros(2**24, device=device)
    copied = memory.nbytes / _seconds(memory.clone, device)
    return Rates(large, support, copied)


def support_operations(layer: Layer, sparsity: float) -> float:
    """Of one small Cholesky factorisation and two triangular solves a row, on a support of sparsity · in inputs."""
    support = sparsity * layer.width
    return layer.rows * (support**3 / 3 + 2 * support**2)


def layer_operations(layer: Layer, decorator: str) -> float:
    """In large products and factors: the inverse factor of the Gram, what decorating multiplies, and layer errors."""
    inverse = 4 / 3 * layer.width**3
    product = 2 * layer.rows * layer.width**2
    # Right-hand sides (exact) or errors pushed on (sparsegpt), and what the report compares: the whole delta's effect,
    # and the mask's, the decorator's and the rounded one's losses.
    return inverse + (4 + (decorator != "none")) * product


def cost(
    layers: Iterable[Layer],
    widths: Iterable[int],
    copied_bytes: int,
    rates: Rates,
    *,
    sparsity: float,
    decorator: str,
    parameters_run: int,
    tokens: int,
    gram_memory: int,
) -> Cost:
    """Of calibrating ``tokens`` through ``parameters_run`` weights, with a Gram for each of ``widths``, and fusing
    ``layers``; ``copied_bytes`` are read or written besides."""
    layers, widths = list(layers), list(widths)
    passed = 2 * parameters_run * tokens
    summed = sum(2 * tokens * width**2 for width in widths)
    grams_bytes = sum(FLOAT32 * width**2 for width in widths)
    layer_bytes = sum(FLOAT32 * layer.rows * layer.width for layer in layers)
    calibrating = (passed + summed) / rates.large + GRAM_VISITS * grams_bytes / rates.copied
    fusing = sum(layer_operations(layer, decorator) for layer in layers) / rates.large
    fusing += (LAYER_VISITS * layer_bytes + copied_bytes) / rates.copied
    if decorator == "exact":
        fusing += sum(support_operations(layer, sparsity) for layer in layers) / rates.support
    largest = max(
        (LAYER_COPIES * layer.rows * layer.width + GRAM_COPIES * layer.width**2 for layer in layers), default=0
    )
    return Cost(calibrating, fusing, max(FLOAT32 * largest, min(gram_memory, grams_bytes)))


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The fastest of some repeats, after one to warm up."""
    found = []
    for _ in range(repeats + 1):
        _synchronise(device)
        started = time.perf_counter()
        work()
        _synchronise(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
