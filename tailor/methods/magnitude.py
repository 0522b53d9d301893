"""Magnitude: keep the entries that fine-tuning moved furthest, undecorated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tailor.chunks import in_chunks
from tailor.masks import Cut, find_cut, top_fraction
from tailor.method import (
    Evidence,
    EvidenceKind,
    Fused,
    Rng,
    difference,
    require_between,
    require_nothing,
    require_one_of,
)
from tailor.scores import salience


@dataclass(frozen=True)
class Magnitude:
    """Keep the top `sparsity` (fraction in [0, 1]) of abs(delta), of each tensor or of all tensors together.

    The global ranking reads every delta four times instead of holding all of them; beside one tensor it keeps 8 bytes
    for each entry tied at the threshold.
    """

    sparsity: float
    ranking: Literal["per_tensor", "global"] = "per_tensor"
    needs: ClassVar[EvidenceKind] = "nothing"

    def __post_init__(self) -> None:
        require_between(self, "sparsity", 0, 1)
        require_one_of(self, "ranking", ("per_tensor", "global"))

    @property
    def is_separable(self) -> bool:
        """Not if all tensors are ranked together."""
        return self.ranking == "per_tensor"

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield fine-tuned tensors under their masks of largest magnitude."""
        require_nothing(self, evidence)
        if self.ranking == "global":
            for name, mask in top_changes(pretrained, finetuned, self.sparsity, rng.seed("global ranking")):
                yield Fused(name, finetuned[name], mask)
        else:
            for name, base in pretrained.items():
                score = _salience(base, finetuned[name])
                yield Fused(name, finetuned[name], top_fraction(score, self.sparsity, seed=rng.seed(name)))


def top_changes(
    pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], fraction: float, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, mask) of the top `fraction` of abs(delta) over all tensors together; the number is exact."""
    names = sorted(pretrained)

    def scores() -> Iterator[Tensor]:
        return (_salience(pretrained[name], finetuned[name]) for name in names)

    count = round(fraction * sum(pretrained[name].numel() for name in names))
    cut: Cut = find_cut(scores, count, seed=seed)
    first_index = 0
    for name, score in zip(names, scores(), strict=True):
        yield name, cut.mask(score, first_index)
        first_index += score.numel()


def _salience(base: Tensor, tuned: Tensor) -> Tensor:
    return in_chunks(lambda *pieces: salience(difference(*pieces)), base, tuned, dtype=torch.float32)
