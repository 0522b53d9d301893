"""WiSE-FT: a point on the line between pretrained and fine-tuned weights (Wortsman et al., arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailor.chunks import in_chunks
from tailor.method import Evidence, EvidenceKind, Fused, Rng, difference, require_between, require_nothing


@dataclass(frozen=True)
class WiseFT:
    """Pretrained + alpha * delta. `alpha` in [0, 1] weighs the fine-tuned end; both ends come out bit for bit."""

    alpha: float = 0.5
    needs: ClassVar[EvidenceKind] = "nothing"

    def __post_init__(self) -> None:
        require_between(self, "alpha", 0, 1)

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield the interpolated tensors; the mask is full unless alpha is 0."""
        require_nothing(self, evidence)
        for name, base in pretrained.items():
            tuned = finetuned[name]
            if self.alpha == 0:
                yield Fused(name, base, torch.zeros_like(base, dtype=torch.bool))
            elif self.alpha == 1:
                yield Fused(name, tuned, None)
            else:
                yield Fused(name, in_chunks(self._interpolate, base, tuned, dtype=base.dtype), None)

    def _interpolate(self, base: Tensor, tuned: Tensor) -> Tensor:
        return base.to(tuned.dtype).float() + self.alpha * difference(base, tuned)
