"""One safetensors file: a lazy, memory-mapped view for reading, and an atomic, byte-deterministic write."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tailor.bits import bit_patterns
from tailor.errors import CheckpointError
from tailor.partial import partial_sibling

_HEADER_KEY = "tailor"
# In the order in which the library lays dtypes out, from the end of a file to its start.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}


class TensorForm(NamedTuple):
    """What is known of a tensor before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the entries in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(Mapping[str, Tensor]):
    """Name -> tensor of one safetensors file, opened at the first look and read through a memory map.

    Raises CheckpointError, when first looked into, if the file is missing, truncated or not safetensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @cached_property
    def _file(self) -> Any:
        return self._open()

    def _open(self) -> Any:
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
        # Through a map of its own: the pages that were read leave memory when the tensor does.
        return self._open().get_tensor(name)

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

    def form(self, name: str) -> TensorForm:
        """Shape and dtype of a tensor, from the file's header alone. Raises CheckpointError like `dtype`."""
        return TensorForm(self.shape(name), self.dtype(name))

    def header(self) -> dict[str, Any]:
        """What `save_tensors` stored beside the tensors. Raises CheckpointError if it was not written by it."""
        text = (self._file.metadata() or {}).get(_HEADER_KEY)
        if text is None:
            raise CheckpointError(f"{self.path}: holds tensors but no header of this library; is it the right file?")
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path}: its header is damaged ({error}); copy it again") from error


class TensorFileWriter:
    """A new safetensors file whose tensors are written one by one, in any order, each straight to its place.

    `forms` say what will be written. The bytes are those that the safetensors library writes, which takes all tensors
    at once. Raises OSError; `missing` names what is still to be written.
    """

    def __init__(self, path: Path, forms: Mapping[str, TensorForm], metadata: Mapping[str, str]) -> None:
        self._path = path
        self._forms = forms
        self._starts: dict[str, int] = {}
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        # Wider dtypes first, so that every tensor is aligned without gaps.
        for name in sorted(forms, key=lambda name: (-_RANKS[forms[name].dtype], name)):
            shape, dtype = forms[name]
            start, end = end, end + forms[name].nbytes
            entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._starts[name] = start
        header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._data_start = 8 + len(header)
        self.missing = set(forms)
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(self._data_start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the announced form."""
        assert TensorForm(tuple(tensor.shape), tensor.dtype) == self._forms[name]
        with open(self._path, "r+b") as file:
            file.seek(self._data_start + self._starts[name])
            file.write(bit_patterns(tensor).cpu().numpy().data)
        self.missing.discard(name)


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file: whole or not at all, and the same bytes every time.

    The header is one metadata entry, since readers of safetensors do not keep the order of several. Replaces an
    existing file. Raises CheckpointError if the file cannot be written.
    """
    path = Path(path)
    forms = {name: TensorForm(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    metadata = {_HEADER_KEY: json.dumps(header, sort_keys=True, separators=(",", ":"))}
    try:
        with partial_sibling(path, folder=False) as partial:
            writer = TensorFileWriter(partial, forms, metadata)
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); check free space and permissions") from error
