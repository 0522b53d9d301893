"""Model Tailor: keep the entries that matter most to the target task, and decorate them (arXiv 2402.12048)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tailor.decorate import DECORATORS, Decorated, Decorator, decorate_and_check, layer_errors
from tailor.errors import SingularGram, TailorError, telling_tokens
from tailor.gram import Grams, damp
from tailor.linalg import MORE_EVIDENCE, inverse_factor
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
from tailor.support import PRECISIONS, Precision


class Layer(NamedTuple):
    """A layer before decorating: delta and mask, (out, in), damped Gram and, where needed, its inverse's factor."""

    delta: Tensor
    mask: Tensor
    gram: Tensor
    factor: Tensor | None

    def settle(self, base: Tensor, tuned: Tensor, decorated: Tensor) -> tuple[Tensor, Tensor]:
        """The fused weight in float32, and the delta, zero off the mask, that is left of it after rounding."""
        compensation = torch.where(self.mask, decorated - self.delta, 0)
        fused = tuned.float() + compensation  # Θ_sft itself, to the bit, where C = 0
        # What is written has the base's dtype; deltas are counted from the base as the fine-tuned dtype holds it.
        written = fused.to(base.dtype).float() - base.to(tuned.dtype).float()
        return fused, torch.where(self.mask, written, 0)


@dataclass(frozen=True)
class Tailor:
    """Fused = mask * (fine-tuned + C) + (1 - mask) * pretrained, tensor by tensor (Eq. 3).

    Linear weights, those with a Gram: the mask takes the top `sparsity` (fraction kept, in [0, 1]) of the score of
    Eq. 11, in which `omega` in [0, 1] weighs salience against sensitivity, and C is the `decorator`'s compensation
    (Thm. 4.5). Other tensors (embeddings, norms, biases): the mask is by salience, and C is 0. `damping` is the
    fraction of the Gram's mean diagonal added to it. `precision` is that in which `exact` solves; rows that float32
    leaves with too large a residual are solved in float64 in any case.

    The report gives each layer's error (`tailor.decorate.layer_error`) on the damped calibration Gram, and on the
    damped held-out Gram if there is one: of the mask alone (`none`), of the decorator before rounding to the storage
    dtype, and `rounded` after it; with `compare_decorators`, of all three decorators. Where `exact` was among them, it
    also gives the `residual` of its equations (`tailor.support.Solution`).
    """

    sparsity: float
    omega: float = 0.5
    decorator: Decorator = "sparsegpt"
    damping: float = 0.01
    compare_decorators: bool = False
    precision: Precision = "float32"
    needs: ClassVar[EvidenceKind] = "grams"

    def __post_init__(self) -> None:
        require_between(self, "sparsity", 0, 1)
        require_between(self, "omega", 0, 1)
        require_one_of(self, "decorator", DECORATORS)
        require_between(self, "damping", 0, sys.float_info.max)
        require_one_of(self, "precision", PRECISIONS)

    def fuse(
        self, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], evidence: Evidence, rng: Rng
    ) -> Iterator[Fused]:
        """Yield tensors one by one; `facts` hold `token_count`, `errors` and `residual` for those with a Gram.

        Raises SingularGram naming the layer, and TailorError if no tensor in scope has a Gram or one does not fit.
        """
        grams = grams_of(self, evidence)
        require_a_gram(pretrained, grams)
        for name, base in pretrained.items():
            tuned = finetuned[name]
            if name in grams.calibration:
                yield self._fuse_layer(name, base, tuned, grams, rng)
            else:
                yield Fused(name, tuned, self.choose_by_salience(name, base, tuned, rng))

    def _fuse_layer(self, name: str, base: Tensor, tuned: Tensor, grams: GramEvidence, rng: Rng) -> Fused:
        token_count = grams.calibration.token_count(name)
        with telling_tokens(token_count):
            layer = self.choose(name, base, tuned, grams.calibration, rng)
            candidates = self.decorations(name, layer)
        deltas = {how: candidate.delta for how, candidate in candidates.items()}
        fused, rounded = layer.settle(base, tuned, deltas[self.decorator])
        facts: dict[str, Any] = {
            "token_count": token_count,
            "errors": self.errors(name, layer, {**deltas, "rounded": rounded}, grams),
        }
        if "exact" in candidates:
            facts["residual"] = candidates["exact"].residual
        return Fused(name, fused, layer.mask, facts)

    def choose(self, name: str, base: Tensor, tuned: Tensor, grams: Grams, rng: Rng) -> Layer:
        """The mask of a layer that has a Gram, by the score of Eq. 11, and what it was chosen from."""
        gram = self.damped(grams, name, base)
        delta = difference(base, tuned)
        needs_factor = self.omega < 1 or self.decorator == "sparsegpt" or self.compare_decorators
        factor = inverse_factor(gram, name) if needs_factor else None
        score = salience(delta) if factor is None else fused_score(delta, diagonal_of_inverse(factor), self.omega)
        mask = top_fraction(score, self.sparsity, seed=rng.seed(name), last=delta == 0)
        return Layer(delta, mask, gram, factor)

    def choose_by_salience(self, name: str, base: Tensor, tuned: Tensor, rng: Rng) -> Tensor:
        """The mask of a tensor that has no Gram."""
        return top_fraction(salience(difference(base, tuned)), self.sparsity, seed=rng.seed(name))

    def decorations(self, name: str, layer: Layer) -> dict[str, Decorated]:
        """The delta under the mask as it is and as decorated, or with `compare_decorators` all three, by decorator."""
        return {
            how: decorate_and_check(
                layer.delta, layer.mask, layer.gram, how, name=name, factor=layer.factor, precision=self.precision
            )
            for how in DECORATORS
            if how in ("none", self.decorator) or self.compare_decorators
        }

    def errors(
        self, name: str, layer: Layer, deltas: Mapping[str, Tensor], grams: GramEvidence
    ) -> dict[str, dict[str, float]]:
        """Layer errors of fused deltas on calibration and, if there are any, held-out tokens."""
        on = {"calibration": layer.gram}
        if grams.held_out is not None and name in grams.held_out:
            on["held_out"] = self.damped(grams.held_out, name, layer.delta)
        return {tokens: layer_errors(layer.delta, deltas, gram) for tokens, gram in on.items()}

    def damped(self, grams: Grams, name: str, weight: Tensor) -> Tensor:
        """The layer's damped Gram. Raises SingularGram if without damping there are fewer tokens than inputs."""
        gram = fitting_gram(grams, name, weight)
        token_count = grams.token_count(name)
        if self.damping == 0 and token_count < weight.shape[1]:
            raise SingularGram(
                f"{name}: {token_count} tokens cannot tell {weight.shape[1]} inputs apart without damping; "
                f"{MORE_EVIDENCE}",
                token_count,
            )
        return damp(gram, self.damping)


def require_a_gram(names: Iterable[str], evidence: GramEvidence) -> None:
    """Raise TailorError if no name has a Gram: then Grams and scope do not belong together."""
    names, grams = tuple(names), evidence.calibration
    if names and not evidence.is_share and not any(name in grams for name in names):
        raise TailorError(
            f"none of the {len(names)} tensors in scope has a Gram (scope: {names[0]}, ...; "
            f"Grams: {next(iter(grams), 'none at all')}, ...); calibrate the layers in scope, under "
            "the checkpoint's tensor names"
        )


def fitting_gram(grams: Grams, name: str, weight: Tensor) -> Tensor:
    """The layer's undamped Gram, on the weight's device. Raises TailorError if it does not fit the weight."""
    gram = grams[name]
    if weight.ndim != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
        raise TailorError(
            f"{name}: a Gram of shape {tuple(gram.shape)} does not fit a weight of shape {tuple(weight.shape)}, "
            "(out, in); calibrate this model's own layers"
        )
    return gram.to(weight.device)
