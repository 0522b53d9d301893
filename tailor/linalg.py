"""Cholesky factors that are right or raise."""

from __future__ import annotations

import torch
from torch import Tensor

from tailor.errors import SingularGram

# A pivot below so many units of rounding beside its diagonal entry is noise: sums over thousands of tokens leave about
# 8 where one input depends on others. Damping stays clear of that: with 1 %, even two equal inputs that carry all the
# energy of n leave 3e5 / n units.
_NOISE_UNITS = 8


def cholesky(matrices: Tensor, place: str) -> Tensor:
    """Lower Cholesky factors of symmetric positive definite matrices (..., n, n), in their dtype and on their device.

    Where float32 does not carry through an ill-conditioned matrix, the factor is computed in float64. Raises
    SingularGram, its message starting with `place`, if a matrix is not positive definite to the precision it is
    stored in: a pivot that is rounding noise beside its diagonal entry is a direction without calibration data.
    """
    factors, failures = torch.linalg.cholesky_ex(matrices)
    if _is_sound(factors, failures, matrices):
        return factors
    if matrices.dtype == torch.float32:
        factors, failures = torch.linalg.cholesky_ex(matrices.double())
        if _is_sound(factors, failures, matrices):
            return factors.float()
    raise SingularGram(
        f"{place} is not positive definite, so some inputs cannot be told apart; raise the damping or calibrate with "
        "more samples"
    )


def inverse_factor(gram: Tensor, name: str = "") -> Tensor:
    """Upper triangular U with Uᵀ·U = gram⁻¹, (in, in): the Cholesky factor of the inverse, which is never formed.

    With J the reversal of the order of inputs, J·gram·J = L·Lᵀ gives gram = R·Rᵀ for the upper triangular
    R = J·L·J, and U = R⁻¹. Raises SingularGram naming the layer.
    """
    reversed_factor = cholesky(gram.flip(0, 1), f"{_label(name)}the Gram of {gram.shape[0]} inputs")
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(reversed_factor.flip(0, 1), identity, upper=True)


def _is_sound(factors: Tensor, failures: Tensor, matrices: Tensor) -> bool:
    pivots = factors.diagonal(dim1=-2, dim2=-1).square()
    noise = _NOISE_UNITS * torch.finfo(matrices.dtype).eps * matrices.diagonal(dim1=-2, dim2=-1)
    return not bool(failures.any()) and bool((pivots > noise).all())


def _label(name: str) -> str:
    return f"{name}: " if name else ""
