"""The procedure of the authors' released code, which departs from the paper; for comparison, never a default.

It is there for LLaVA only. What follows the released procedure: the score (squared fine-tuned weight, not delta, over
the squared pivot of the inverse factor), its normalisation by mean and deviation per row inside each block of columns,
the threshold per block on weights that earlier blocks have updated already, the sign of the error feedback (added where
Thm. 4.5 subtracts), inputs that never fired given a unit diagonal, fine-tuned values for every tensor that is not a
linear weight of a layer, and pretrained values for the projector's weights.

What is our reading: the released code chooses one entry too many to revert in each block and reverts ties together,
here the number is exact and ties go by hash; it divides by a deviation of zero, here such a score is 0. Its Grams come
from layers run one after the other on fused inputs and without an attention mask; here they are what calibration gives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailor.errors import TailorError, telling_tokens
from tailor.gram import damp
from tailor.linalg import inverse_factor
from tailor.masks import top_fraction
from tailor.method import Evidence, EvidenceKind, Fused, Rng, grams_of, require_between
from tailor.scope import select

_BLOCK = 128


@dataclass(frozen=True)
class ReleasedCode:
    """Released procedure: `sparsity` is the fraction kept, `salience_weight` (in [0, 1]) stands where omega does.

    `reset` are name patterns of tensors that go back to pretrained values whatever their changes (the projector's
    weights), `keep_finetuned` of linear weights that stay fine-tuned although they have a Gram (the head). A pattern
    that matches nothing in scope is a ScopeError, so give an empty list where there is none.
    """

    sparsity: float
    salience_weight: float = 0.8
    damping: float = 0.01
    reset: tuple[str, ...] = ("*projector*.weight",)
    keep_finetuned: tuple[str, ...] = ("*lm_head*",)
    needs: ClassVar[EvidenceKind] = "grams"
    is_separable: ClassVar[bool] = False  # its patterns must match in the scope

    def __post_init__(self) -> None:
        require_between(self, "sparsity", 0, 1)
        require_between(self, "salience_weight", 0, 1)
        require_between(self, "damping", 0, sys.float_info.max)
        for patterns in ("reset", "keep_finetuned"):  # a list from a config file is as good
            object.__setattr__(self, patterns, tuple(getattr(self, patterns)))

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield tensors one by one. Raises SingularGram naming the layer, and ScopeError for a pattern in vain."""
        grams = grams_of(self, evidence).calibration
        reset = select(pretrained, self.reset) if self.reset else ()
        kept = select(pretrained, self.keep_finetuned) if self.keep_finetuned else ()
        for name, base in pretrained.items():
            tuned = finetuned[name]
            if name in reset:
                yield Fused(name, base, torch.zeros_like(base, dtype=torch.bool))
            elif name not in grams or name in kept:
                yield Fused(name, tuned, None)
            elif base.ndim != 2 or grams[name].shape[0] != base.shape[1]:
                raise TailorError(f"{name}: its Gram does not fit its shape {tuple(base.shape)}; calibrate this model")
            else:
                with telling_tokens(grams.token_count(name)):
                    fused, mask = self._fuse_layer(name, base, tuned, grams[name].to(base.device), rng)
                yield Fused(name, fused, mask, {"token_count": grams.token_count(name)})

    def _fuse_layer(self, name: str, base: Tensor, tuned: Tensor, gram: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        gram = gram.clone()
        gram.diagonal()[gram.diagonal() == 0] = 1
        factor = inverse_factor(damp(gram, self.damping), name)
        start = base.to(tuned.dtype).float()
        weight = tuned.float().clone()
        change = (weight - start).abs()
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        for first in range(0, weight.shape[1], _BLOCK):
            end = min(first + _BLOCK, weight.shape[1])
            corner = factor[first:end, first:end]
            block = weight[:, first:end].clone()
            loss = block.square() / corner.diagonal().square()
            score = self.salience_weight * _standardised(change[:, first:end])
            score += (1 - self.salience_weight) * _standardised(loss)
            mask[:, first:end] = top_fraction(score, self.sparsity, seed=rng.seed(f"{name}:{first}"))
            errors = torch.zeros_like(block)
            for j in range(end - first):
                error = (block[:, j] - start[:, first + j]) / corner[j, j]
                errors[:, j] = error.masked_fill(mask[:, first + j], 0)
                block[:, j + 1 :] += errors[:, j : j + 1] * corner[j, j + 1 :]  # `+`: where Thm. 4.5 has a minus
            weight[:, first:end] = block
            weight[:, end:] += errors @ factor[first:end, end:]
        return weight, mask


def _standardised(score: Tensor) -> Tensor:
    """Row by row minus the mean over the deviation (with n - 1), 0 where the row is constant."""
    if score.shape[1] < 2:
        return torch.zeros_like(score)
    deviation = score.std(dim=1, keepdim=True)
    return torch.where(deviation > 0, (score - score.mean(dim=1, keepdim=True)) / deviation, 0)
