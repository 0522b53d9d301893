"""Tensors as the bits they are stored in."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def integer_of(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype in which bit patterns of `dtype` are held."""
    return _INTEGER_OF_SIZE[dtype.itemsize]


def bit_patterns(tensor: Tensor) -> Tensor:
    """The entries' bit patterns as a flat integer tensor; a view where the tensor is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(integer_of(tensor.dtype))


def sha256(tensor: Tensor) -> str:
    """Hex digest of the tensor's bytes in row-major order (little-endian, as in safetensors)."""
    return hashlib.sha256(bit_patterns(tensor).cpu().numpy().data).hexdigest()
