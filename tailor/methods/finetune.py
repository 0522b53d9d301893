"""Fine-tune: the fine-tuned weights, the end of every comparison that has learnt the target task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tailor.method import Evidence, EvidenceKind, Fused, Rng, require_nothing


@dataclass(frozen=True)
class FineTune:
    """Take every fine-tuned tensor in scope as it is."""

    needs: ClassVar[EvidenceKind] = "nothing"

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield the fine-tuned tensors under full masks."""
        require_nothing(self, evidence)
        for name, tuned in finetuned.items():
            yield Fused(name, tuned, None)
