"""Grafting: learn which entries to keep, from the target loss (Panigrahi et al., arXiv 2302.06600)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailor.errors import NotFinite, TailorError
from tailor.method import (
    Evidence,
    EvidenceKind,
    Fused,
    Rng,
    TargetTask,
    difference,
    require_between,
    require_count,
    target_of,
)
from tailor.methods.magnitude import top_changes


@dataclass(frozen=True)
class Grafting:
    """Start from the largest changes and let gradient descent on a soft mask add and remove entries.

    The base patch g is the top `sparsity` (fraction in [0, 1]) of abs(delta) over all tensors together. The soft mask
    is g + (1 - 2g) * sigmoid(S - bias) with S drawn from U[0, 1); for `steps` steps, S descends the target loss at
    pretrained + mask * delta by plain gradient steps of size `learning_rate`. After each step the mask is rounded, and
    of all rounded masks, the base patch included, the one with the best target score wins (the first of equals).

    The mask's size may leave `sparsity`; the number of entries that differ from the base patch is reported for each
    tensor, and if it is 0 everywhere the result is that of global magnitude. Memory: five float32 copies of the scope.
    """

    sparsity: float
    steps: int = 100
    learning_rate: float = 1e7
    bias: float = 10.0
    needs: ClassVar[EvidenceKind] = "gradients"
    is_separable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_between(self, "sparsity", 0, 1)
        require_count(self, "steps")
        require_between(self, "learning_rate", 0, sys.float_info.max)
        require_between(self, "bias", -sys.float_info.max, sys.float_info.max)

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield fine-tuned tensors under the learnt masks; `facts` hold `flipped_count`."""
        task = target_of(self, evidence)
        base_patch = dict(top_changes(pretrained, finetuned, self.sparsity, rng.seed("global ranking")))
        base = {name: pretrained[name].to(finetuned[name].dtype).float() for name in base_patch}
        delta = {name: difference(pretrained[name], finetuned[name]) for name in base_patch}
        logits = {
            name: torch.rand(base[name].shape, generator=rng.generator(name)).to(base[name].device) - self.bias
            for name in base_patch
        }

        best_mask = base_patch
        best_score = _finite_score(task, _graft(pretrained, finetuned, base_patch))
        last_mask = base_patch
        for _ in range(self.steps):
            soft = {name: _toggle(base_patch[name].float(), logits[name].sigmoid()) for name in base_patch}
            gradient = task.gradient({name: base[name] + soft[name] * delta[name] for name in base_patch})
            for name, patch in base_patch.items():
                if name not in gradient:
                    raise TailorError(f"{name}: the target task gave no gradient for it; train it or leave it out")
                if not gradient[name].isfinite().all():
                    raise NotFinite(f"{name}: the gradient of the target loss is not finite; check samples and weights")
                step = gradient[name].float().to(logits[name].device) * delta[name]  # the chain rule, from the loss
                step *= 1 - 2 * patch.float()  # through the mask
                step *= torch.sigmoid(logits[name]) * torch.sigmoid(-logits[name])  # and the sigmoid, to S
                logits[name] -= self.learning_rate * step
            mask = {name: base_patch[name] ^ (logits[name] > 0) for name in base_patch}
            if all(torch.equal(mask[name], last_mask[name]) for name in mask):
                continue  # the same weights have the same score
            last_mask, score = mask, _finite_score(task, _graft(pretrained, finetuned, mask))
            if score > best_score:
                best_mask, best_score = mask, score

        for name, mask_of_tensor in best_mask.items():
            flipped_count = int((mask_of_tensor ^ base_patch[name]).sum())
            yield Fused(name, finetuned[name], mask_of_tensor, {"flipped_count": flipped_count})


def _finite_score(task: TargetTask, weights: Mapping[str, Tensor]) -> float:
    score = task.score(weights)
    if not math.isfinite(score):
        raise NotFinite(f"Grafting: the target score is {score}; check the target's samples and the weights")
    return score


def _toggle(patch: Tensor, weight: Tensor) -> Tensor:
    """Patch + (1 - 2 * patch) * weight: the patch at weight 0, its complement at weight 1."""
    return patch + (1 - 2 * patch) * weight


def _graft(
    pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], mask: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {
        name: torch.where(mask[name], finetuned[name].to(pretrained[name].dtype), pretrained[name]) for name in mask
    }
