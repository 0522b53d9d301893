"""Scores that rank the entries of a layer's delta for the mask (§ 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tailor.linalg import inverse_factor


def salience(delta: Tensor) -> Tensor:
    """How far fine-tuning moved each entry: the magnitude of the delta (Eq. 10)."""
    return delta.abs()


def sensitivity(delta: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """Loss added by reverting one entry and re-optimising the rest: delta² / (2 · diag(H⁻¹)) (Eq. 9, Thm. 4.3).

    `delta` is (out, in), `inverse_diagonal` = diag(H⁻¹) is (in,).
    """
    return delta.square() / (2 * inverse_diagonal)


def minmax(score: Tensor) -> Tensor:
    """Score moved and scaled to [0, 1] over the whole layer; 0 everywhere if it is constant."""
    if score.numel() == 0:
        return torch.zeros_like(score)
    low, high = torch.aminmax(score)
    return (score - low) / (high - low) if bool(high > low) else torch.zeros_like(score)


def fused_score(delta: Tensor, inverse_diagonal: Tensor, omega: float) -> Tensor:
    """omega · minmax(salience) + (1 - omega) · minmax(sensitivity), (out, in) (Eq. 11)."""
    return omega * minmax(salience(delta)) + (1 - omega) * minmax(sensitivity(delta, inverse_diagonal))


def inverse_diagonal(gram: Tensor, name: str = "") -> Tensor:
    """diag(gram⁻¹), (in,), of a damped Gram. Raises SingularGram naming the layer; nothing is ever put in its place."""
    return diagonal_of_inverse(inverse_factor(gram, name))


def diagonal_of_inverse(factor: Tensor) -> Tensor:
    """diag(gram⁻¹), (in,), from the upper triangular factor U of `tailor.linalg.inverse_factor`: gram⁻¹ = Uᵀ·U."""
    return factor.square().sum(0)
