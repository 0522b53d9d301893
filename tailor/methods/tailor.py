"""Model Tailor: keep the entries that matter most to the target task, and decorate them (arXiv 2402.12048)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tailor.decorate import DECORATORS, Decorator, decorate, layer_error
from tailor.errors import SingularGram, TailorError
from tailor.gram import Grams, damp
from tailor.linalg import inverse_factor
from tailor.masks import top_fraction
from tailor.method import (
    Evidence,
    EvidenceKind,
    Fused,
    GramEvidence,
    Rng,
    difference,
    grams_of,
    require_between,
    require_one_of,
)
from tailor.scores import diagonal_of_inverse, fused_score, salience


@dataclass(frozen=True)
class Tailor:
    """Fused = mask * (fine-tuned + C) + (1 - mask) * pretrained, tensor by tensor (Eq. 3).

    Linear weights, those with a Gram: the mask takes the top `sparsity` (fraction kept, in [0, 1]) of the score of
    Eq. 11, in which `omega` in [0, 1] weighs salience against sensitivity, and C is the `decorator`'s compensation
    (Thm. 4.5). Other tensors (embeddings, norms, biases): the mask is by salience, and C is 0. `damping` is the
    fraction of the Gram's mean diagonal added to it.

    The report gives each layer's error (`tailor.decorate.layer_error`) on the damped calibration Gram, and on the
    damped held-out Gram if there is one: of the mask alone (`none`), of the decorator before rounding to the storage
    dtype, and `rounded` after it; with `compare_decorators`, of all three decorators.
    """

    sparsity: float
    omega: float = 0.5
    decorator: Decorator = "sparsegpt"
    damping: float = 0.01
    compare_decorators: bool = False
    needs: ClassVar[EvidenceKind] = "grams"

    def __post_init__(self) -> None:
        require_between(self, "sparsity", 0, 1)
        require_between(self, "omega", 0, 1)
        require_one_of(self, "decorator", DECORATORS)
        require_between(self, "damping", 0, float("inf"))

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield tensors one by one; `facts` hold `token_count` and `errors` for those with a Gram.

        Raises SingularGram naming the layer, and TailorError if no tensor in scope has a Gram or one does not fit.
        """
        grams = grams_of(self, evidence)
        if pretrained and not any(name in grams.calibration for name in pretrained):
            raise TailorError(
                f"none of the {len(pretrained)} tensors in scope has a Gram (scope: {next(iter(pretrained))}, ...; "
                f"Grams: {next(iter(grams.calibration), 'none at all')}, ...); calibrate the layers in scope, under "
                "the checkpoint's tensor names"
            )
        for name, base in pretrained.items():
            tuned = finetuned[name]
            if name in grams.calibration:
                yield self._fuse_layer(name, base, tuned, grams, rng)
            else:
                score = salience(difference(base, tuned))
                yield Fused(name, tuned, top_fraction(score, self.sparsity, seed=rng.seed(name)))

    def _fuse_layer(self, name: str, base: Tensor, tuned: Tensor, grams: GramEvidence, rng: Rng) -> Fused:
        gram = self._damped(grams.calibration, name, base)
        delta = difference(base, tuned)
        needs_factor = self.omega < 1 or self.decorator == "sparsegpt" or self.compare_decorators
        factor = inverse_factor(gram, name) if needs_factor else None

        score = salience(delta) if factor is None else fused_score(delta, diagonal_of_inverse(factor), self.omega)
        mask = top_fraction(score, self.sparsity, seed=rng.seed(name), last=delta == 0)

        candidates: dict[str, Tensor] = {
            how: decorate(delta, mask, gram, how, name=name, factor=factor)
            for how in DECORATORS
            if how in ("none", self.decorator) or self.compare_decorators
        }
        compensation = torch.where(mask, candidates[self.decorator] - delta, 0)
        fused = tuned.float() + compensation  # Θ_sft itself, to the bit, where C = 0
        rounded = torch.where(mask, difference(base, fused.to(base.dtype).to(tuned.dtype)), 0)

        def errors(some_gram: Tensor) -> dict[str, float]:
            deltas: dict[str, Tensor] = {**candidates, "rounded": rounded}
            return {what: layer_error(delta, fused_delta, some_gram) for what, fused_delta in deltas.items()}

        facts: dict[str, Any] = {
            "token_count": grams.calibration.token_count(name),
            "errors": {"calibration": errors(gram)},
        }
        if grams.held_out is not None and name in grams.held_out:
            facts["errors"]["held_out"] = errors(self._damped(grams.held_out, name, base))
        return Fused(name, fused, mask, facts)

    def _damped(self, grams: Grams, name: str, weight: Tensor) -> Tensor:
        gram = grams[name]
        if weight.ndim != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
            raise TailorError(
                f"{name}: a Gram of shape {tuple(gram.shape)} does not fit a weight of shape {tuple(weight.shape)}, "
                "(out, in); calibrate this model's own layers"
            )
        if self.damping == 0 and grams.token_count(name) < weight.shape[1]:
            raise SingularGram(
                f"{name}: {grams.token_count(name)} tokens cannot tell {weight.shape[1]} inputs apart without damping; "
                "raise the damping or calibrate with more samples"
            )
        return damp(gram.to(weight.device), self.damping)
