"""Several aims for one fused delta: the weighted least squares behind two-sided tailoring and joint stitching.

Each term says which delta a layer should have on which inputs. Decorating is the case of one term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tailor.linalg import output_energy
from tailor.support import Precision, Solution, solve


class Term(NamedTuple):
    """One aim: act like `delta`, (out, in), on inputs whose damped Gram is `gram`, (in, in); `weight` is 0 or more."""

    delta: Tensor
    gram: Tensor
    weight: float = 1.0


def optimal_compensation(
    terms: Sequence[Term], start: Tensor, mask: Tensor, name: str = "", precision: Precision = "float32"
) -> Tensor:
    """The values of `solve_terms`: the C, zero off the mask, for which F = start + C makes the `objective` least."""
    return solve_terms(terms, start, mask, name, precision).values


def solve_terms(
    terms: Sequence[Term], start: Tensor, mask: Tensor, name: str = "", precision: Precision = "float32"
) -> Solution:
    """The C, zero off the mask, for which F = start + C makes the `objective` least, and the solver's residual.

    `start`, (out, in), is zero off `mask`. With A = Σ weight · gram and S the support of a row,
    C_S = (A_SS)⁻¹ (Σ weight · (delta - start) · gram)_S, in the dtype of `start` and exactly 0 in rows where `start` is
    what every term asks for. Sums over several terms are taken in float64, so that their order leaves no trace;
    `precision` is that of all the rest. Raises SingularGram naming the layer, see `tailor.support.solve`.
    """
    terms = [term for term in terms if term.weight > 0]
    wanted = [term.delta - start for term in terms]
    wanting = torch.zeros(start.shape[0], dtype=torch.bool, device=start.device)
    for change in wanted:
        wanting |= (change.amin(1) != 0) | (change.amax(1) != 0)  # on a CPU, many times as fast as aminmax() or any()
    rows = (wanting & mask.amax(1)).nonzero()[:, 0]
    if not len(rows):
        return Solution(torch.zeros_like(start), 0.0)
    dtype = torch.float64 if precision == "float64" else start.dtype
    is_whole = len(rows) == len(start)  # as in most layers, whose copies are spared
    gram, rhs = _normal_equations(terms, wanted if is_whole else [change[rows] for change in wanted], dtype)
    values, residual = solve(gram, rhs, mask if is_whole else mask[rows], name=name, precision=precision)
    values = values.to(start.dtype)
    if is_whole:
        return Solution(values, residual)
    compensation = torch.zeros_like(start)
    compensation[rows] = values
    return Solution(compensation, residual)


def _normal_equations(terms: Sequence[Term], wanted: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Σ weight · gram and Σ weight · wanted · gram in `dtype`; the weight of a single term changes nothing."""

    def product(term: Term, change: Tensor) -> Tensor:
        return change.to(dtype) @ term.gram.to(dtype)

    if len(terms) == 1:
        return terms[0].gram.to(dtype), product(terms[0], wanted[0])
    gram = torch.zeros(terms[0].gram.shape, dtype=torch.float64, device=terms[0].gram.device)
    rhs = torch.zeros(wanted[0].shape, dtype=torch.float64, device=gram.device)
    for term, change in zip(terms, wanted, strict=True):
        gram.add_(term.gram, alpha=term.weight)
        rhs.add_(product(term, change), alpha=term.weight)
    return gram.to(dtype), rhs.to(dtype)


def objective(terms: Sequence[Term], fused_delta: Tensor) -> float:
    """Σ weight · tr((delta - F)·gram·(delta - F)ᵀ), which `optimal_compensation` makes least."""
    return math.fsum(term.weight * output_energy(term.delta - fused_delta, term.gram) for term in terms)


def relative_objective(terms: Sequence[Term], fused_delta: Tensor) -> float:
    """The objective over that of a zero delta; 0 or infinity where no term asks for any change."""
    lost, whole = objective(terms, fused_delta), objective(terms, torch.zeros_like(fused_delta))
    if whole == 0:
        return 0.0 if lost == 0 else math.inf
    return lost / whole
