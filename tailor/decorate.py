"""The patch decorator: compensate the kept entries of a delta for the reverted ones (Thm. 4.5).

All three answer one question, how to choose the fused delta F on the mask so that tr((D - F)·H·(D - F)ᵀ) is small:
`none` keeps D as it is, `sparsegpt` (the paper's choice) pushes errors to the right, `exact` is the minimiser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tailor.errors import InvalidSetting
from tailor.linalg import inverse_factor, output_energy
from tailor.support import Precision
from tailor.terms import Term, solve_terms

Decorator = Literal["none", "sparsegpt", "exact"]
DECORATORS: tuple[Decorator, ...] = get_args(Decorator)
_BLOCK = 128


class Decorated(NamedTuple):
    """A fused `delta`, (out, in), and how well `exact` solved for it: the residual of `tailor.support.Solution`."""

    delta: Tensor
    residual: float | None = None


def decorate(
    delta: Tensor,
    mask: Tensor,
    gram: Tensor,
    how: Decorator,
    *,
    name: str = "",
    factor: Tensor | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """The masked, compensated delta, (out, in), zero off the mask and equal to `delta` wherever nothing is compensated.

    `delta` and `mask` are (out, in), `gram` (in, in) is damped already. `factor` spares `sparsegpt` the work of
    `inverse_factor(gram)`; `precision` is that in which `exact` solves. Raises SingularGram naming the layer, and
    InvalidSetting for an unknown decorator.
    """
    return decorate_and_check(delta, mask, gram, how, name=name, factor=factor, precision=precision).delta


def decorate_and_check(
    delta: Tensor,
    mask: Tensor,
    gram: Tensor,
    how: Decorator,
    *,
    name: str = "",
    factor: Tensor | None = None,
    precision: Precision = "float32",
) -> Decorated:
    """As `decorate`, with the residual that `exact` left; None for the others, which solve nothing."""
    if how == "none":
        return Decorated(torch.where(mask, delta, 0))
    if how == "sparsegpt":
        fused = push_errors(delta, mask, inverse_factor(gram, name) if factor is None else factor)
        return Decorated(torch.where(mask, fused, 0))
    if how == "exact":
        kept = torch.where(mask, delta, 0)
        compensation, residual = solve_terms([Term(delta, gram)], kept, mask, name, precision)
        return Decorated(kept.add_(compensation), residual)
    raise InvalidSetting(f"decorator: {how!r} is unknown; choose one of {', '.join(DECORATORS)}")


def push_errors(delta: Tensor, mask: Tensor, factor: Tensor) -> Tensor:
    """Go through the columns from left to right; a reverted entry pushes its error onto the columns after it.

    `factor` is the upper triangular U with H⁻¹ = Uᵀ·U. What row j of U does to the columns from j on is what the
    optimal brain surgeon would do with H restricted to those columns, so an entry compensates for reverted entries to
    its left only. Columns of a block are updated one by one, the columns after it once a block.
    """
    columns = delta.T.contiguous()  # (in, out): one input's entries lie together
    is_kept = mask.T.contiguous()
    for first in range(0, columns.shape[0], _BLOCK):
        end = min(first + _BLOCK, columns.shape[0])
        block = columns[first:end].clone()
        corner = factor[first:end, first:end]
        errors = torch.empty_like(block)
        for j in range(end - first):
            # Thm. 4.5: what is lost by reverting, in units of U_jj, never crosses from one row of the layer to another.
            errors[j] = (block[j] / corner[j, j]).masked_fill_(is_kept[first + j], 0)
            block[j + 1 :].addr_(corner[j, j + 1 :], errors[j], alpha=-1)
        columns[first:end] = block
        columns[end:].addmm_(factor[first:end, end:].T, errors, alpha=-1)
    return columns.T


def layer_error(delta: Tensor, fused_delta: Tensor, gram: Tensor) -> float:
    """Share of the delta's effect on the layer's outputs that is lost: tr(R·H·Rᵀ) / tr(D·H·Dᵀ) with R = D - F.

    0 if fused and full delta act alike, 1 if the fused delta is zero. Where the full delta has no effect at all, 0 if
    the fused one has none either, else infinity.
    """
    return layer_errors(delta, {"": fused_delta}, gram)[""]


def layer_errors(delta: Tensor, fused_deltas: Mapping[str, Tensor], gram: Tensor) -> dict[str, float]:
    """The `layer_error` of each of several fused deltas of one layer."""
    whole = output_energy(delta, gram)
    lost = {what: output_energy(delta - fused, gram) for what, fused in fused_deltas.items()}
    if whole == 0:
        return {what: 0.0 if energy == 0 else math.inf for what, energy in lost.items()}
    return {what: energy / whole for what, energy in lost.items()}
