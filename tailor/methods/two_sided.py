"""Two-sided tailoring: hold the outputs of target and old tasks at once (Eq. 4 with its constraint)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailor.decorate import layer_errors
from tailor.errors import TailorError, telling_tokens
from tailor.gram import damp
from tailor.method import Evidence, EvidenceKind, Fused, GramEvidence, Rng, grams_of, require_between, require_one_of
from tailor.methods.tailor import Layer, Tailor, fitting_gram, require_a_gram
from tailor.support import PRECISIONS, Precision, Solution
from tailor.terms import Term, solve_terms


@dataclass(frozen=True)
class TwoSided:
    """Model Tailor whose decoration also holds each layer's outputs where they were on samples to retain.

    Eq. 4 asks that fusing should not change what the layer does on old tasks; the paper drops that, having no data.
    Given samples to retain, old or general-purpose, F minimises

        tr((D - F)·H·(D - F)ᵀ) + mu · tr(F·K·Fᵀ)    over F that are zero off the mask,

    where D is the delta and H and K are the Grams of target and retained inputs. `mu` weighs the second term, 0 or
    more; at 0 this is `Tailor` with the exact decorator. `damping` goes to the sum H + mu·K, which is the same as to
    both. `sparsity`, `omega`, `precision` and the tensors without a Gram are as in `Tailor`: masks know the target
    task alone. But with `mu` above 0 a full mask does not give the fine-tuned weights.

    The report gives layer errors on target inputs as `Tailor` does, of `two_sided` in place of the decorator, and
    beside them the `residual` of its equations and the drift: the share of the full delta's effect on the retained
    inputs (undamped) that is left, 0 for pretrained and 1 for fine-tuned weights. With `compare_decorators`, both are
    there for all one-sided decorators.
    """

    sparsity: float
    omega: float = 0.5
    mu: float = 0.1
    damping: float = 0.01
    compare_decorators: bool = False
    precision: Precision = "float32"
    needs: ClassVar[EvidenceKind] = "grams"
    sees_old_tasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_between(self, "sparsity", 0, 1)
        require_between(self, "omega", 0, 1)
        require_between(self, "mu", 0, sys.float_info.max)
        require_between(self, "damping", 0, sys.float_info.max)
        require_one_of(self, "precision", PRECISIONS)

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield tensors; with a Gram, `facts` hold `token_count`, `retain_token_count`, `errors`, `drift`, `residual`.

        Raises SingularGram naming the layer, and TailorError if no tensor in scope has a Gram, if one does not fit, or
        if a layer has one of the target task but none to retain.
        """
        grams = grams_of(self, evidence)
        one_sided = Tailor(self.sparsity, self.omega, "none", self.damping, self.compare_decorators, self.precision)
        require_a_gram(pretrained, grams)
        for name, base in pretrained.items():
            tuned = finetuned[name]
            if name in grams.calibration:
                yield self._fuse_layer(name, base, tuned, grams, one_sided, rng)
            else:
                yield Fused(name, tuned, one_sided.choose_by_salience(name, base, tuned, rng))

    def _fuse_layer(
        self, name: str, base: Tensor, tuned: Tensor, grams: GramEvidence, one_sided: Tailor, rng: Rng
    ) -> Fused:
        assert grams.retain is not None  # as `grams_of` made sure
        if name not in grams.retain:
            raise TailorError(
                f"{name}: has a Gram of the target task, but none of samples to retain; calibrate on the samples to "
                "retain for the same layers"
            )
        retained = fitting_gram(grams.retain, name, base)
        token_count = grams.calibration.token_count(name)
        with telling_tokens(token_count):
            layer = one_sided.choose(name, base, tuned, grams.calibration, rng)
            compensation, residual = self._compensation(name, layer, retained)
            candidates = one_sided.decorations(name, layer)
        decorated = torch.where(layer.mask, layer.delta + compensation, 0)
        fused, rounded = layer.settle(base, tuned, decorated)
        deltas = {how: candidate.delta for how, candidate in candidates.items()}
        deltas |= {"two_sided": decorated, "rounded": rounded}
        facts = {
            "token_count": token_count,
            "retain_token_count": grams.retain.token_count(name),
            "errors": one_sided.errors(name, layer, deltas, grams),
            "drift": layer_errors(layer.delta, {what: layer.delta - delta for what, delta in deltas.items()}, retained),
            "residual": residual,
        }
        return Fused(name, fused, layer.mask, facts)

    def _compensation(self, name: str, layer: Layer, retained: Tensor) -> Solution:
        terms = [
            Term(layer.delta, layer.gram),
            Term(torch.zeros_like(layer.delta), damp(retained, self.damping), self.mu),
        ]
        kept = torch.where(layer.mask, layer.delta, 0)
        return solve_terms(terms, kept, layer.mask, name, self.precision)
