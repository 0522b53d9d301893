"""Bring two checkpoints of one architecture to the same tensors: tied duplicates, grown vocabularies, dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tailor.bits import bit_patterns
from tailor.checkpoint import form_of, shape_of
from tailor.errors import CheckpointMismatch, InvalidSetting, PrecisionLoss
from tailor.report import TensorReport
from tailor.scope import FUSIBLE_DTYPES, require_same_tensors
from tailor.storage import TensorForm

Embeddings = Literal["refuse", "keep_finetuned_rows"]
OutDtype = Literal["pretrained", "finetuned"]
_SAMPLED_ENTRIES = 2**20


@dataclass(frozen=True, eq=False)
class Aligned:
    """Two checkpoints as views with the same names and shapes, and what it takes to get back to the fine-tuned layout.

    `copies` are tensors of the fine-tuned checkpoint, and of which other they are a tied duplicate; `dropped` the same
    of the pretrained one alone. `grown` counts the rows that fine-tuning added to a tensor.
    """

    pretrained: Mapping[str, Tensor]
    finetuned: Mapping[str, Tensor]
    copies: Mapping[str, str]
    dropped: Mapping[str, str]
    grown: Mapping[str, int]
    _whole: Mapping[str, Tensor]

    def complete(self, name: str, fused: Tensor) -> Tensor:
        """The fused tensor with the rows that fine-tuning added, as they are, in the dtype of `fused`."""
        if name not in self.grown:
            return fused
        return torch.cat([fused, self._whole[name][fused.shape[0] :].to(fused.dtype)])

    def completed(
        self, stream: Iterable[tuple[str, Tensor, TensorReport]]
    ) -> Iterator[tuple[str, Tensor, TensorReport]]:
        """The stream of fused tensors in the fine-tuned layout: with added rows and tied duplicates.

        Duplicates that only the pretrained checkpoint has are accounted for in `dropped_rows`.
        """
        copies_of: dict[str, list[str]] = {}
        for copy, original in self.copies.items():
            copies_of.setdefault(original, []).append(copy)
        for name, fused, row in stream:
            tensor = self.complete(name, fused)
            if name in self.grown:
                facts = {**row.facts, "added_row_count": self.grown[name]}
                row = TensorReport(name, row.shape, row.fate, row.mask_count, row.changed_count, facts)
            yield name, tensor, row
            for copy in copies_of.get(name, ()):
                yield copy, tensor, TensorReport(copy, row.shape, "tied", facts={"tied_to": name})

    def forms(self) -> dict[str, TensorForm]:
        """Shapes and dtypes of the completed stream."""
        forms = {}
        for name in self.pretrained:
            shape, dtype = form_of(self.pretrained, name)
            forms[name] = TensorForm((shape[0] + self.grown[name], *shape[1:]) if name in self.grown else shape, dtype)
        return forms | {copy: forms[original] for copy, original in self.copies.items()}

    def dropped_rows(self) -> list[TensorReport]:
        """The report's rows for duplicates that the fused checkpoint, like the fine-tuned one, does not repeat."""
        return [
            TensorReport(name, shape_of(self.pretrained, original), "tied", facts={"tied_to": original})
            for name, original in self.dropped.items()
        ]


def align(
    pretrained: Mapping[str, Tensor],
    finetuned: Mapping[str, Tensor],
    *,
    embeddings: Embeddings = "refuse",
    out_dtype: OutDtype = "pretrained",
) -> Aligned:
    """Views of both checkpoints that a method can fuse.

    A tensor that one checkpoint alone holds must equal, bit for bit, another that both hold: a tied embedding that was
    saved twice. Where both saved it twice, it is one tensor too. Where fine-tuning grew the vocabulary,
    `keep_finetuned_rows` fuses the rows of the pretrained one and keeps the others as fine-tuned. With `out_dtype`
    "finetuned" the pretrained tensors are cast to the fine-tuned dtypes, which then are the result's. Raises
    CheckpointMismatch for any other difference, naming every tensor.
    """
    for name, value, choices in (
        ("embeddings", embeddings, get_args(Embeddings)),
        ("out_dtype", out_dtype, get_args(OutDtype)),
    ):
        if value not in choices:
            raise InvalidSetting(f"{name}: {value!r} is unknown; choose one of {', '.join(choices)}")
    dropped = _duplicates(pretrained, finetuned)
    tied = _tied_heads(pretrained, finetuned)
    copies = _duplicates(finetuned, pretrained) | tied
    base: Mapping[str, Tensor] = _Without(pretrained, {**dropped, **tied})
    whole: Mapping[str, Tensor] = _Without(finetuned, copies)
    grown = _grown(base, whole)
    if grown and embeddings == "refuse":
        raise CheckpointMismatch(
            "fine-tuning grew the vocabulary: "
            + "; ".join(
                f"{name} has rows {shape_of(base, name)[0]} to {shape_of(whole, name)[0] - 1} more" for name in grown
            )
            + "; embeddings=keep_finetuned_rows fuses the rows that both have and keeps these as fine-tuned"
        )
    tuned = _FirstRows(whole, {name: shape_of(base, name)[0] for name in grown}) if grown else whole
    require_same_tensors(base, tuned)
    if out_dtype == "finetuned":
        base = _Cast(base, tuned)
    return Aligned(base, tuned, copies, dropped, grown, whole)


def require_precision(pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raise PrecisionLoss if the pretrained dtype, which is the result's, can't hold what fine-tuning changed.

    That is so if most of the changed entries become the pretrained ones again when rounded to it. Looks at up to a
    million entries of each tensor whose dtype is coarser than the fine-tuned one.
    """
    changed = lost = 0
    coarse = ""
    for name in names:
        base, tuned = pretrained[name], finetuned[name]
        if base.dtype == tuned.dtype or torch.promote_types(base.dtype, tuned.dtype) == base.dtype:
            continue
        before = base.reshape(-1)[:_SAMPLED_ENTRIES]
        after = tuned.reshape(-1)[:_SAMPLED_ENTRIES]
        differs = before.to(after.dtype) != after
        back = bit_patterns(after.to(before.dtype)) == bit_patterns(before)
        changed += int(differs.sum())
        lost += int((differs & back).sum())
        coarse = f"{base.dtype} of the pretrained checkpoint ({name})"
    if lost > changed / 2:
        raise PrecisionLoss(
            f"{coarse}: {lost / changed:.0%} of what fine-tuning changed is lost when rounded to it; set "
            "out_dtype=finetuned, or convert the pretrained checkpoint first"
        )


class _View(Mapping[str, Tensor]):
    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def form(self, name: str) -> TensorForm:
        return form_of(self.weights, name)


class _Without(_View):
    def __init__(self, weights: Mapping[str, Tensor], left_out: Iterable[str]) -> None:
        super().__init__(weights)
        self._left_out = frozenset(left_out)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._left_out:
            raise KeyError(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if name not in self._left_out)

    def __contains__(self, name: object) -> bool:
        return name not in self._left_out and super().__contains__(name)


class _FirstRows(_View):
    def __init__(self, weights: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        super().__init__(weights)
        self._counts = counts

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        return tensor[: self._counts[name]] if name in self._counts else tensor

    def form(self, name: str) -> TensorForm:
        shape, dtype = super().form(name)
        return TensorForm((self._counts[name], *shape[1:]) if name in self._counts else shape, dtype)


class Only(_View):
    """Some tensors of a checkpoint."""

    def __init__(self, weights: Mapping[str, Tensor], names: Iterable[str]) -> None:
        super().__init__(weights)
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


class _Cast(_View):
    def __init__(self, weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self._like = like

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).to(self.form(name).dtype)

    def form(self, name: str) -> TensorForm:
        shape, dtype = super().form(name)
        wanted = form_of(self._like, name).dtype
        return TensorForm(shape, wanted if {dtype, wanted} <= set(FUSIBLE_DTYPES) else dtype)


def _duplicates(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, str]:
    """Matrices that `one` alone holds → the matrix of both that they equal. Those that equal none are left out."""
    alone = [name for name in one if name not in other]
    return _twins(alone, [name for name in one if name in other], one)


def _tied_heads(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, str]:
    """Heads that equal, in both checkpoints alike, their embeddings: saved twice, they are one tensor all the same."""
    shared = [name for name in one if name in other]
    heads, embeddings = ([name for name in shared if part in name] for part in ("lm_head", "embed"))
    return _twins(heads, embeddings, one, other)


def _twins(names: Iterable[str], candidates: Sequence[str], *checkpoints: Mapping[str, Tensor]) -> dict[str, str]:
    """Matrices among `names` → the first candidate that each of the checkpoints holds the same values of."""

    def are_twins(name: str, candidate: str) -> bool:
        return all(
            shape_of(each, candidate) == shape_of(each, name) and torch.equal(each[candidate], each[name])
            for each in checkpoints
        )

    matrices = (name for name in names if len(shape_of(checkpoints[0], name)) == 2)
    found = {name: next((twin for twin in candidates if are_twins(name, twin)), None) for name in matrices}
    return {name: twin for name, twin in found.items() if twin is not None}


def _grown(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, int]:
    """Rows that matrices and vectors have more in `tuned`, if all that differ in shape have as many more."""
    differing = {
        name: (shape_of(base, name), shape_of(tuned, name))
        for name in base
        if name in tuned and shape_of(base, name) != shape_of(tuned, name)
    }
    grown = {
        name: after[0] - before[0]
        for name, (before, after) in differing.items()
        if before and after[1:] == before[1:] and after[0] > before[0]
    }
    return grown if len(grown) == len(differing) and len(set(grown.values())) == 1 else {}
