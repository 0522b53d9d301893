"""Checkpoint folders: a lazy, read-only view and an atomic, sharded writer.

A checkpoint is a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`, and beside the
weights whatever its model needs (config, tokenizer, processor), as transformers lays it out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from tailor.errors import CheckpointError
from tailor.partial import partial_sibling
from tailor.sizes import parse_bytes
from tailor.storage import TensorFile, TensorFileWriter, TensorForm

MAX_SHARD_BYTES = "5GB"
_SINGLE = "model.safetensors"
_CONFIG = "config.json"
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

    def forms(self) -> dict[str, TensorForm]:
        """Shape and dtype of every tensor, from the headers alone."""
        return {name: self.form(name) for name in self.names}

    def form(self, name: str) -> TensorForm:
        """Shape and dtype of a tensor, from the header alone."""
        return self._file_of(name).form(name)

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


@runtime_checkable
class Described(Protocol):
    """Weights that know a tensor's form without reading it."""

    def form(self, name: str) -> TensorForm:
        """Shape and dtype."""
        ...


def form_of(weights: Mapping[str, Tensor], name: str) -> TensorForm:
    """Shape and dtype of a tensor, from a header where there is one."""
    if isinstance(weights, Described):
        return weights.form(name)
    return TensorForm(tuple(weights[name].shape), weights[name].dtype)


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Shape of a tensor, from a header where there is one."""
    return form_of(weights, name).shape


class CheckpointWriter:
    """Context manager that writes a checkpoint folder: all of it, or, after any exception, nothing.

    `forms` say which tensors will be written (default: those of the folder `like`, as they are there). They come in any
    order, and each goes straight to its place in a shard of at most `max_shard_bytes` (a number, or "5GB"; a larger
    tensor has a shard for itself), so that none is held in memory. Files other than weights are copied byte for byte
    from `like`, but for the dtype that its `config.json` states, if another is written. Everything goes to a hidden
    sibling of `out`, which is renamed at the end; what a killed process left there, the next writer to the same `out`
    removes.

    Raises CheckpointError if `out` exists or cannot be written, if the disk has no room for it, or if what was written
    is not what was announced; InvalidSetting for `max_shard_bytes`.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        like: str | os.PathLike[str],
        max_shard_bytes: int | str = MAX_SHARD_BYTES,
        *,
        forms: Mapping[str, TensorForm] | None = None,
    ) -> None:
        self._out = Path(out)
        self._like = Checkpoint(like)
        self._forms = self._like.forms() if forms is None else forms
        self._max_shard_bytes = parse_bytes(max_shard_bytes, "max_shard_bytes")
        self._shard_of: dict[str, str] = {}
        self._files: dict[str, TensorFileWriter] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        if self._out.exists() or self._out.is_symlink():
            raise CheckpointError(f"{self._out}: already exists; remove it or choose another output folder")
        try:
            self._partial = self._cleanup.enter_context(partial_sibling(self._out, folder=True))
            self._start()
        except OSError as error:
            self._cleanup.close()
            raise self._failure(error) from error
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, which has the announced shape and dtype."""
        form = TensorForm(tuple(tensor.shape), tensor.dtype)
        if form != self._forms.get(name):
            raise CheckpointError(f"{self._out}: {name} is {form}, announced was {self._forms.get(name)}")
        file = self._files[self._shard_of[name]]
        if name not in file.missing:
            raise CheckpointError(f"{self._out}: {name} was written twice; every tensor is written once")
        try:
            file.write(name, tensor)
        except OSError as error:
            raise self._failure(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as problem:
            raise self._failure(problem) from problem
        finally:
            self._cleanup.close()

    def _start(self) -> None:
        """Share the tensors out among shards, by name, and make their files."""
        total = sum(form.nbytes for form in self._forms.values())
        free = shutil.disk_usage(self._partial).free
        if free < total:
            raise CheckpointError(
                f"{self._out}: needs {total / 1e9:.3g} GB, and the disk has {free / 1e9:.3g} GB left; make room"
            )
        shards = _share_out(self._forms, self._max_shard_bytes)
        for number, names in enumerate(shards, start=1):
            shard = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._shard_of.update(dict.fromkeys(names, shard))
            # transformers refuses weights whose metadata does not name the framework.
            forms = {name: self._forms[name] for name in names}
            self._files[shard] = TensorFileWriter(self._partial / shard, forms, {"format": "pt"})
        if len(shards) != 1:
            index = {"metadata": {"total_size": total}, "weight_map": self._shard_of}
            (self._partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _finish(self) -> None:
        """See that every tensor is there, add the other files, and show the folder."""
        missing = sorted(name for file in self._files.values() for name in file.missing)
        if missing:
            raise CheckpointError(f"{self._out}: {len(missing)} tensors were not written: {', '.join(missing[:5])}")
        for path in self._like.other_files():
            (self._partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._like.folder / path, self._partial / path)
        self._state_dtype()
        self._partial.rename(self._out)

    def _state_dtype(self) -> None:
        """Have a copied config name the dtype that was written, where it names another: loading would round to that."""
        path = self._partial / _CONFIG
        entries: Counter[torch.dtype] = Counter()
        for form in self._forms.values():
            if form.dtype.is_floating_point:
                entries[form.dtype] += form.nbytes
        if not path.is_file() or not entries:
            return
        text = path.read_text(encoding="utf-8")
        try:
            config = json.loads(text)
        except ValueError:
            return  # whoever reads it will say so
        stated = _with_dtype(config, str(entries.most_common(1)[0][0]).removeprefix("torch."))
        if stated != config:
            path.write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")

    def _failure(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self._out}: cannot be written ({error}); check free space and permissions. Nothing was left behind"
        )


def _with_dtype(config: Any, dtype: str) -> Any:
    """The config of a model, those of its parts included, with this dtype wherever it states one."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }


def _share_out(forms: Mapping[str, TensorForm], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, in groups of at most so many bytes or of one; a single empty group if there are none."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in sorted(forms):
        if shards[-1] and used + forms[name].nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += forms[name].nbytes
    return shards


def _read_index(path: Path) -> dict[str, str]:
    try:
        shard_of = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        if not all(isinstance(shard, str) for shard in shard_of.values()):
            raise TypeError("weight_map is not of names of files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable index ({error!r}); copy the checkpoint again") from error
    return shard_of


def _companions(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not any(file.name.endswith(_WEIGHT_SUFFIXES) for file in path.rglob("*")):
                yield from _companions(path)
        elif not path.name.endswith(_WEIGHT_SUFFIXES):
            yield path
