"""A patch: the sparse record of what fusing changed, which turns base into fused weights and back, bit for bit.

Of each changed tensor it keeps where entries changed and the XOR of their bit patterns before and after. XOR is its own
inverse, so one patch serves both ways, and unlike a difference of floats it loses nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailor.bits import bit_patterns, sha256
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
        """Read what `save` wrote. Raises CheckpointError if the file cannot be read, PatchError if it is no patch."""
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
        except (KeyError, TypeError) as error:
            raise PatchError(f"{file.path}: incomplete ({error!r}); make the patch again") from error
        return cls(tensors, stored["header"])

    def apply_to(self, base: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, fused tensor) for each patched tensor, on the base's device; `base` itself stays as it is.

        Raises PatchError, before anything is yielded, unless `base` holds each patched tensor with the recorded bits
        at the patched places. Bits elsewhere are free, so patches of disjoint places can be stacked; `unlike` tells
        which tensors are not the recorded base as a whole.
        """
        self._check(base, is_fused=False)
        return self._flip(base)

    def remove_from(self, fused: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, base tensor) for each patched tensor: the inverse of `apply_to`, with the same conditions."""
        self._check(fused, is_fused=True)
        return self._flip(fused)

    def unlike(self, base: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Names of patched tensors that are not, as a whole, bit for bit the base that the patch was made from."""
        return tuple(
            name
            for name, tensor in self.tensors.items()
            if name not in base or sha256(base[name]) != tensor.base_sha256 or _form(base[name]) != _recorded(tensor)
        )

    def _flip(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors.items():
            before = weights[name].detach()
            bits = bit_patterns(before).clone()
            bits[tensor.indices().to(bits.device)] ^= tensor.xors.to(bits.device)
            yield name, bits.view(before.dtype).view(before.shape)

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
