"""Checkpoint folders: a lazy, read-only view and an atomic, sharded writer.

A checkpoint is a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`, and beside the
weights whatever its model needs (config, tokenizer, processor), as transformers lays it out.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tailor.errors import CheckpointError
from tailor.storage import TensorFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json")


class Checkpoint(Mapping[str, Tensor]):
    """Name -> tensor of a checkpoint folder, read through memory maps and never modified.

    Headers are read when first needed. Raises CheckpointError: at construction if there are no safetensors weights or
    the index names missing files, later if a file proves truncated or lacks a tensor that the index promises.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder; give the folder of a checkpoint")
        single, index = self.folder / _SINGLE, self.folder / _INDEX
        if single.is_file():
            self._shards = {_SINGLE: TensorFile(single)}
            self._shard_of: Mapping[str, str] | None = None
        elif index.is_file():
            self._shard_of = _read_index(index)
            self._shards = {shard: TensorFile(self.folder / shard) for shard in sorted(set(self._shard_of.values()))}
            missing = [shard for shard, file in self._shards.items() if not file.path.is_file()]
            if missing:
                raise CheckpointError(f"{index}: names missing files: {', '.join(missing)}; complete the folder")
        else:
            raise CheckpointError(
                f"{self.folder}: neither {_SINGLE} nor {_INDEX}; save or convert the weights as safetensors"
            )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Tensor names, sorted."""
        return self._shards[_SINGLE].names if self._shard_of is None else tuple(sorted(self._shard_of))

    @property
    def numel(self) -> int:
        """Number of entries over all tensors, from the headers alone."""
        return sum(torch.Size(self.shape(name)).numel() for name in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._file_of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header alone."""
        return self._file_of(name).dtype(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of(name)[name]

    def __contains__(self, name: object) -> bool:
        return name in (self._shards[_SINGLE] if self._shard_of is None else self._shard_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def other_files(self) -> tuple[Path, ...]:
        """Paths, relative to the folder and sorted, of the files that belong to the model but are not weights.

        Left out are weights in whatever format (a pickled twin would contradict fused weights), hidden files, and
        subfolders that hold weights of their own, such as the checkpoints of a trainer.
        """
        return tuple(sorted(path.relative_to(self.folder) for path in _companions(self.folder)))

    def _file_of(self, name: str) -> TensorFile:
        if name not in self:
            raise KeyError(name)
        file = self._shards[_SINGLE if self._shard_of is None else self._shard_of[name]]
        if name not in file:
            raise CheckpointError(f"{file.path}: lacks {name}, which {_INDEX} promises; copy the checkpoint again")
        return file


class CheckpointWriter:
    """Context manager that writes a checkpoint folder: all of it, or, after any exception, nothing.

    Tensors come in any order. At most one shard of at most `max_shard_bytes` bytes (or one larger tensor) is held in
    memory. Files other than weights are copied byte for byte from the folder `like`. Everything goes to a hidden
    sibling of `out`, which is renamed at the end. Raises CheckpointError if `out` exists or cannot be written.
    """

    def __init__(self, out: str | os.PathLike[str], like: str | os.PathLike[str], max_shard_bytes: int = 2**30) -> None:
        self._out = Path(out)
        self._partial = self._out.with_name(f".{self._out.name}.{secrets.token_hex(4)}.partial")
        self._like = Checkpoint(like)
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._written: set[str] = set()

    def __enter__(self) -> Self:
        if self._out.exists() or self._out.is_symlink():
            raise CheckpointError(f"{self._out}: already exists; remove it or choose another output folder")
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise self._failure(error) from error
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, in its own dtype. It must not change until the writer is left."""
        if name in self._written:
            raise CheckpointError(f"{self._out}: {name} was written twice; every tensor is written once")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_shard_bytes:
            self._flush()
        self._written.add(name)
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self._finish()
        except OSError as problem:
            raise self._failure(problem) from problem
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _flush(self) -> None:
        if not self._pending:
            return
        self._shards.append(sorted(self._pending))
        try:
            # transformers refuses weights whose metadata does not name the framework.
            save_file(self._pending, self._partial / f"{len(self._shards)}.safetensors", {"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise self._failure(error) from error
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        """Give the shards their names, now that their number is known, add the other files, and show the folder."""
        count = len(self._shards)
        shard_of: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            shard = _SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._partial / f"{number}.safetensors").rename(self._partial / shard)
            shard_of.update(dict.fromkeys(names, shard))
        if count != 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(shard_of.items()))}
            (self._partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for path in self._like.other_files():
            (self._partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._like.folder / path, self._partial / path)
        self._partial.rename(self._out)

    def _failure(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self._out}: cannot be written ({error}); check free space and permissions. Nothing was left behind"
        )


def _read_index(path: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable index ({error!r}); copy the checkpoint again") from error
    return dict(shard_of)


def _companions(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not any(file.name.endswith(_WEIGHT_SUFFIXES) for file in path.rglob("*")):
                yield from _companions(path)
        elif not path.name.endswith(_WEIGHT_SUFFIXES):
            yield path
