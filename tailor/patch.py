"""A patch: the sparse record of what fusing changed, which turns base into fused weights and back, bit for bit.

Of each changed tensor it keeps where entries changed and the XOR of their bit patterns before and after. XOR is its own
inverse, so one patch serves both ways, and unlike a difference of floats it loses nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailor.bits import bit_patterns, integer_of, sha256
from tailor.errors import PatchError
from tailor.storage import TensorFile, save_tensors

_FORMAT = 1
_ESCAPE = 255


@dataclass(frozen=True, eq=False)
class PatchedTensor:
    """Changes of one tensor.

    `gaps` (uint8) are the numbers of unchanged entries before each changed one, 255 meaning "255, and read on"; `xors`
    (signed integers as wide as the entries) their bit changes. The digests are of the whole base tensor, and of the
    changed entries alone before and after.
    """

    shape: tuple[int, ...]
    dtype: str
    base_sha256: str
    places_sha256: str
    fused_places_sha256: str
    gaps: Tensor
    xors: Tensor

    def indices(self) -> Tensor:
        """Flat indices of the changed entries, ascending, int64."""
        return decode_gaps(self.gaps)


@dataclass(frozen=True, eq=False)
class Patch:
    """Name -> changes, for the tensors that fusing changed, and a header that says how they came about."""

    tensors: Mapping[str, PatchedTensor]
    header: Mapping[str, Any]

    @classmethod
    def between(
        cls,
        pretrained: Mapping[str, Tensor],
        fused: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        header: Mapping[str, Any] | None = None,
    ) -> Patch:
        """The patch from `pretrained` to `fused`, which may name fewer tensors: the others count as unchanged.

        `header` is JSON-ready: base, method, its settings. Raises PatchError if a fused tensor is not in `pretrained`
        with the same shape and dtype.
        """
        tensors = {}
        for name, after in fused.items() if isinstance(fused, Mapping) else fused:
            if name not in pretrained:
                raise PatchError(f"{name}: not among the base's tensors; make the patch against the fusion's own base")
            before = pretrained[name]
            if (before.shape, before.dtype) != (after.shape, after.dtype):
                raise PatchError(
                    f"{name}: base is {_form(before)}, fused is {_form(after)}; a patch needs the same shape and dtype"
                )
            change = _change(before, after)
            if change is not None:
                tensors[name] = change
        return cls(tensors, dict(header or {}))

    @property
    def changed_count(self) -> int:
        """Entries that the patch changes, over all tensors."""
        return sum(tensor.xors.numel() for tensor in self.tensors.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: whole or not at all, equal patches as equal bytes. Raises CheckpointError."""
        stored: dict[str, Tensor] = {}
        entries: dict[str, Any] = {}
        for name, tensor in sorted(self.tensors.items()):
            stored[f"gaps/{name}"], stored[f"xors/{name}"] = tensor.gaps, tensor.xors
            entries[name] = {key: value for key, value in vars(tensor).items() if key not in ("gaps", "xors")}
        save_tensors(path, stored, {"format": _FORMAT, "header": dict(self.header), "tensors": entries})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read what `save` wrote.

        Raises CheckpointError if the file cannot be read, and PatchError if it is no patch or its changes are none that
        tensors of these shapes and dtypes have room for.
        """
        file = TensorFile(path)
        stored = file.header()
        if stored.get("format") != _FORMAT or "tensors" not in stored:
            raise PatchError(f"{file.path}: not a patch of format {_FORMAT}; make it again with this version")
        try:
            tensors = {
                name: PatchedTensor(
                    **{**entry, "shape": tuple(entry["shape"])}, gaps=file[f"gaps/{name}"], xors=file[f"xors/{name}"]
                )
                for name, entry in stored["tensors"].items()
            }
            patch = cls(tensors, stored["header"])
        except (KeyError, TypeError, AttributeError) as error:
            raise PatchError(f"{file.path}: incomplete ({error!r}); make the patch again") from error
        for name, tensor in tensors.items():
            if not _fits(tensor):
                raise PatchError(
                    f"{file.path}: the changes of {name} do not fit its shape or dtype; the file is damaged, copy it "
                    "again"
                )
        return patch

    def apply_to(self, base: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, fused tensor) for each patched tensor, on the base's device; `base` itself stays as it is.

        Raises PatchError, before anything is yielded, unless `base` holds each patched tensor with the recorded bits
        at the patched places, and later if a tensor does not become what was recorded. Bits elsewhere are free, so
        patches of disjoint places can be stacked; `unlike` tells which tensors are not the recorded base as a whole.
        """
        applied = self.applied(base)
        return ((name, applied[name]) for name in self.tensors)

    def remove_from(self, fused: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, base tensor) for each patched tensor: the inverse of `apply_to`, with the same conditions."""
        removed = self.removed(fused)
        return ((name, removed[name]) for name in self.tensors)

    def applied(self, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A view of all of `base` in which tensors are patched as they are read. Raises PatchError like `apply_to`.

        Another patch can be applied to the view, and so on: each sees what those before it made.
        """
        self._check(base, is_fused=False)
        return _Flipped(base, self, to_fused=True)

    def removed(self, fused: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The inverse of `applied`."""
        self._check(fused, is_fused=True)
        return _Flipped(fused, self, to_fused=False)

    def unlike(self, base: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Names of patched tensors that are not, as a whole, bit for bit the base that the patch was made from."""
        return tuple(
            name
            for name, tensor in self.tensors.items()
            if name not in base or sha256(base[name]) != tensor.base_sha256 or _form(base[name]) != _recorded(tensor)
        )

    def _check(self, weights: Mapping[str, Tensor], *, is_fused: bool) -> None:
        for name, tensor in self.tensors.items():
            if name not in weights:
                raise PatchError(
                    f"{name}: the patch changes it, but the weights lack it; use the model it was made for"
                )
            form, recorded = _form(weights[name]), _recorded(tensor)
            if form != recorded:
                raise PatchError(f"{name}: the weights are {form}, the patch is for {recorded}; load them as such")
            found = sha256(_at(weights[name], tensor.indices()))
            wanted, other = tensor.places_sha256, tensor.fused_places_sha256
            if is_fused:
                wanted, other = other, wanted
            if found != wanted:
                raise PatchError(f"{name}: {_explain(found == other, is_fused, self.header)}")


class _Flipped(Mapping[str, Tensor]):
    """Weights as they become when a patch is applied or removed, a tensor at a time."""

    def __init__(self, weights: Mapping[str, Tensor], patch: Patch, *, to_fused: bool) -> None:
        self._weights, self._patch, self._to_fused = weights, patch, to_fused

    def __getitem__(self, name: str) -> Tensor:
        before = self._weights[name].detach()
        tensor = self._patch.tensors.get(name)
        if tensor is None:
            return before
        bits, indices = bit_patterns(before).clone(), tensor.indices().to(before.device)
        bits[indices] ^= tensor.xors.to(bits.device)
        if sha256(bits[indices]) != (tensor.fused_places_sha256 if self._to_fused else tensor.places_sha256):
            raise PatchError(
                f"{name}: the patch does not lead to the entries that it recorded; it is damaged, copy it again"
            )
        return bits.view(before.dtype).view(before.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def encode_gaps(indices: Tensor) -> Tensor:
    """Ascending flat indices as uint8 gaps: the unchanged entries before each, 255 meaning "255, and read on"."""
    gaps = torch.diff(indices, prepend=indices.new_tensor([-1])) - 1
    escapes = gaps // _ESCAPE
    ends = (escapes + 1).cumsum(0) - 1
    code = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), _ESCAPE, dtype=torch.uint8)
    code[ends] = (gaps % _ESCAPE).to(torch.uint8)
    return code


def decode_gaps(code: Tensor) -> Tensor:
    """The inverse of `encode_gaps`."""
    ends = (code != _ESCAPE).nonzero()[:, 0]
    unchanged_before = code.cumsum(0, dtype=torch.int64)[ends]
    return unchanged_before + torch.arange(len(ends))


def _change(before: Tensor, after: Tensor) -> PatchedTensor | None:
    xors = bit_patterns(before).cpu() ^ bit_patterns(after).cpu()
    indices = xors.nonzero()[:, 0]
    if not len(indices):
        return None
    return PatchedTensor(
        shape=tuple(before.shape),
        dtype=_dtype_name(before),
        base_sha256=sha256(before),
        places_sha256=sha256(_at(before, indices)),
        fused_places_sha256=sha256(_at(after, indices)),
        gaps=encode_gaps(indices),
        xors=xors[indices],
    )


def _fits(tensor: PatchedTensor) -> bool:
    """Whether gaps and xors are of the right kinds, equally many, and within the tensor."""
    gaps, xors, dtype = tensor.gaps, tensor.xors, getattr(torch, str(tensor.dtype), None)
    if not isinstance(dtype, torch.dtype) or gaps.dtype != torch.uint8 or xors.dtype != integer_of(dtype):
        return False
    if gaps.ndim != 1 or xors.ndim != 1 or (gaps.numel() and int(gaps[-1]) == _ESCAPE):
        return False
    count = int((gaps != _ESCAPE).count_nonzero())
    end = int(gaps.sum(dtype=torch.int64)) + count  # each changed entry stands after its gap
    return count == xors.numel() and end <= math.prod(tensor.shape)


def _explain(is_other_side: bool, is_fused: bool, header: Mapping[str, Any]) -> str:
    if is_other_side:
        return "the patch is not applied here" if is_fused else "the patch is applied here already"
    base = f" ({header['base']})" if header.get("base") else ""
    return f"the weights differ from the patch's base{base} at the patched places; use the base it was made from"


def _at(tensor: Tensor, indices: Tensor) -> Tensor:
    return bit_patterns(tensor)[indices.to(tensor.device)]


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _form(tensor: Tensor) -> str:
    return f"{_dtype_name(tensor)} {tuple(tensor.shape)}"


def _recorded(tensor: PatchedTensor) -> str:
    return f"{tensor.dtype} {tensor.shape}"
