"""DARE: drop entries of the delta at random and rescale the rest (Yu et al., arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from tailor.chunks import in_chunks
from tailor.method import Evidence, EvidenceKind, Fused, Rng, difference, require_between, require_nothing


@dataclass(frozen=True)
class Dare:
    """Keep each entry of the delta with probability `sparsity` and divide it by that, so its mean stays.

    `sparsity` in [0, 1] is the fraction kept, 1 - p in the paper's terms. At 1 nothing is rescaled and the fine-tuned
    weights come out bit for bit; at 0, the pretrained.
    """

    sparsity: float
    needs: ClassVar[EvidenceKind] = "nothing"

    def __post_init__(self) -> None:
        require_between(self, "sparsity", 0, 1)

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield tensors whose mask is the draw itself, so its size is `sparsity` only on average."""
        require_nothing(self, evidence)
        for name, base in pretrained.items():
            tuned = finetuned[name]
            # Piece by piece the draws are the same as at once.
            mask = in_chunks(partial(self._draw, rng.generator(name)), base, dtype=torch.bool)
            if self.sparsity in (0, 1):
                yield Fused(name, tuned, mask)
            else:
                yield Fused(name, in_chunks(self._rescale, base, tuned, dtype=base.dtype), mask)

    def _draw(self, generator: torch.Generator, piece: Tensor) -> Tensor:
        return (torch.rand(piece.shape, generator=generator) < self.sparsity).to(piece.device)

    def _rescale(self, base: Tensor, tuned: Tensor) -> Tensor:
        return base.to(tuned.dtype).float() + difference(base, tuned) / self.sparsity
