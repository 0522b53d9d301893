"""Cholesky factors that are right or raise."""

from __future__ import annotations

import torch
from torch import Tensor

from tailor.errors import SingularGram

# A pivot below so many units of rounding beside its diagonal entry is noise: sums over thousands of tokens leave about
# 8 where one input depends on others. Damping stays clear of that: with 1 %, even two equal inputs that carry all the
# energy of n leave 3e5 / n units.
_NOISE_UNITS = 8

MORE_EVIDENCE = "raise the damping or calibrate with more samples"


def cholesky(matrices: Tensor, place: str) -> Tensor:
    """Lower Cholesky factors of symmetric positive definite matrices (..., n, n), in their dtype and on their device.

    Where float32 does not carry through an ill-conditioned matrix, the factor is computed in float64. Raises
    SingularGram, its message starting with `place`, if a matrix is not positive definite to the precision it is
    stored in: a pivot that is rounding noise beside its diagonal entry is a direction without calibration data.
    """
    noise = rounding_noise(matrices.diagonal(dim1=-2, dim2=-1))
    factors, are_sound = checked_cholesky(matrices, noise)
    if not bool(are_sound.all()) and matrices.dtype == torch.float32:
        factors, are_sound = checked_cholesky(matrices.double(), noise)
    if bool(are_sound.all()):
        return factors.to(matrices.dtype)
    raise SingularGram(f"{place} is not positive definite, so some inputs cannot be told apart; {MORE_EVIDENCE}")


def checked_cholesky(matrices: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors, and whether each has only squared pivots above the `noise`, (..., n), of their places."""
    factors, failures = torch.linalg.cholesky_ex(matrices)
    pivots = factors.diagonal(dim1=-2, dim2=-1).square()
    return factors, (failures == 0) & (pivots > noise).all(-1)


def rounding_noise(diagonal: Tensor) -> Tensor:
    """What a squared pivot must exceed to be more than rounding beside its diagonal entry, of the same shape."""
    return _NOISE_UNITS * torch.finfo(diagonal.dtype).eps * diagonal


def inverse_factor(gram: Tensor, name: str = "") -> Tensor:
    """Upper triangular U with Uᵀ·U = gram⁻¹, (in, in): the Cholesky factor of the inverse, which is never formed.

    With J the reversal of the order of inputs, J·gram·J = L·Lᵀ gives gram = R·Rᵀ for the upper triangular
    R = J·L·J, and U = R⁻¹. Raises SingularGram naming the layer.
    """
    reversed_factor = cholesky(gram.flip(0, 1), f"{_label(name)}the Gram of {gram.shape[0]} inputs")
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(reversed_factor.flip(0, 1), identity, upper=True)


def _label(name: str) -> str:
    return f"{name}: " if name else ""


def output_energy(delta: Tensor, gram: Tensor) -> float:
    """tr(delta · gram · deltaᵀ): twice the mean squared change of the layer's outputs, summed over outputs."""
    return max(0.0, float(((delta @ gram) * delta).sum(dtype=torch.float64)))
