"""Zero-shot: the pretrained weights, the end of every comparison that has forgotten nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailor.method import Evidence, EvidenceKind, Fused, Rng, require_nothing


@dataclass(frozen=True)
class ZeroShot:
    """Change nothing."""

    needs: ClassVar[EvidenceKind] = "nothing"

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield the pretrained tensors under empty masks."""
        require_nothing(self, evidence)
        for name, base in pretrained.items():
            yield Fused(name, base, torch.zeros_like(base, dtype=torch.bool))
