"""Elementwise work on large tensors, a chunk at a time.

A chunk and what is computed from it stay in the processor's cache, and its memory is used again for the next one. Fresh
memory of a whole tensor's size for each intermediate result costs several times more than the arithmetic. On an
accelerator a tensor is a single chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# From 2**15 entries on, torch shares an operation among threads, which wait for one another by spinning: on cores that
# have other work to do, that made fusing ten times slower.
CHUNK_ENTRIES = 31 * 1024


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat pieces of tensors of one shape, side by side: views where the tensors are contiguous."""
    size = CHUNK_ENTRIES if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    return zip(*(torch.split(tensor.detach().reshape(-1), size) for tensor in tensors), strict=True)


def in_chunks(compute: Callable[..., Tensor], *tensors: Tensor, dtype: torch.dtype) -> Tensor:
    """`compute(*pieces)` for each piece of the tensors in turn, rounded to `dtype`, in the shape of the first."""
    result = torch.empty(tensors[0].shape, dtype=dtype, device=tensors[0].device)
    for piece, *inputs in chunks(result, *tensors):
        piece.copy_(compute(*inputs))
    return result


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity."""
    if not tensor.numel():
        return True
    # Both extremes are NaN if any entry is.
    return bool(torch.stack([end for (piece,) in chunks(tensor) for end in piece.aminmax()]).isfinite().all())


def has_nan(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds NaN."""
    return bool(tensor.numel()) and bool(torch.stack([piece.max() for (piece,) in chunks(tensor)]).isnan().any())
