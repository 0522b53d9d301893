"""One safetensors file: a lazy, memory-mapped view for reading, and an atomic, byte-deterministic write."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tailor.errors import CheckpointError

_HEADER_KEY = "tailor"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFile(Mapping[str, Tensor]):
    """Name -> tensor of one safetensors file, opened at the first look and read through a memory map.

    Raises CheckpointError, when first looked into, if the file is missing, truncated or not safetensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @cached_property
    def _file(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: not a whole safetensors file ({error}); copy or download it again"
            ) from error

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Tensor names, sorted."""
        return tuple(sorted(self._file.keys()))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header alone."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the file's header alone. Raises CheckpointError for one that torch lacks here."""
        code = self._file.get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(f"{self.path}: {name} has dtype {code}, which is not supported; convert it first")
        return _DTYPES[code]

    def header(self) -> dict[str, Any]:
        """What `save_tensors` stored beside the tensors. Raises CheckpointError if it was not written by it."""
        text = (self._file.metadata() or {}).get(_HEADER_KEY)
        if text is None:
            raise CheckpointError(f"{self.path}: holds tensors but no header of this library; is it the right file?")
        return json.loads(text)


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file: whole or not at all, and the same bytes every time.

    The header is one metadata entry, since safetensors does not fix the order of several. Replaces an existing file.
    Raises CheckpointError if the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    metadata = {_HEADER_KEY: json.dumps(header, sort_keys=True, separators=(",", ":"))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); check free space and permissions") from error
    finally:
        partial.unlink(missing_ok=True)
