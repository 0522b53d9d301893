"""Least squares on a support: the one solver behind exact decoration and everything that has its form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tailor.linalg import cholesky


def solve_on_support(
    gram: Tensor, rhs: Tensor, mask: Tensor, *, name: str = "", workspace_bytes: int | None = None
) -> Tensor:
    """Row by row, the minimiser of ½ x·gram·xᵀ - rhs·x over x that is zero off the mask: x_S = (gram_SS)⁻¹ rhs_S.

    `gram` is (in, in), symmetric positive definite on every support; `rhs` and `mask` (bool) are (out, in). Returns
    (out, in) in the dtype of `gram`, exactly zero off the mask. Rows of full support share one Cholesky factor; the
    others are sorted by support size, padded and factored in batches of about `workspace_bytes` bytes (a single
    larger system still runs alone; by default 64 MiB on a CPU, whose caches gain nothing from more, else 1 GiB).
    Raises SingularGram naming the layer `name` and the support size.
    """
    place = f"{name}: the Gram" if name else "the Gram"
    width = gram.shape[0]
    rhs = rhs.to(gram.dtype)
    solution = torch.zeros_like(rhs)
    sizes = mask.sum(1)

    full = (sizes == width).nonzero()[:, 0]
    if len(full):
        factor = cholesky(gram, f"{place} of {width} inputs")
        solution[full] = _solve(factor, rhs[full].T).T

    if workspace_bytes is None:
        workspace_bytes = 2**26 if gram.device.type == "cpu" else 2**30
    by_size = sizes.argsort(descending=True, stable=True)
    by_size = by_size[(sizes[by_size] > 0) & (sizes[by_size] < width)]
    for first, end, size in _batches(sizes[by_size].tolist(), workspace_bytes // gram.element_size()):
        rows = by_size[first:end]
        columns, is_padding = _support_columns(mask[rows], size)
        system = gram[columns[:, :, None], columns[:, None, :]]
        target = rhs[rows].gather(1, columns)
        if is_padding.any():  # a padded place becomes an equation of its own, whose solution is dropped
            system.masked_fill_(is_padding[:, :, None] | is_padding[:, None, :], 0)
            system.diagonal(dim1=1, dim2=2).masked_fill_(is_padding, 1)
        factor = cholesky(system, f"{place} on a support of {size} of {width} inputs")
        values = _solve(factor, target[:, :, None])[:, :, 0]
        row_of_place = rows[:, None].expand_as(columns)
        solution[row_of_place[~is_padding], columns[~is_padding]] = values[~is_padding]
    return solution


def _solve(factor: Tensor, target: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(factor, target, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _batches(sizes: list[int], workspace: int) -> Iterator[tuple[int, int, int]]:
    """Cut descending sizes into (first, end, largest size); padding stays within a sixteenth (or 8 places) a row.

    `workspace` is in entries; gathered system, factor and index arithmetic take about three systems a row.
    """
    first = 0
    while first < len(sizes):
        size = sizes[first]
        limit = first + max(1, workspace // (3 * size * size))
        least = size - max(8, size // 16)
        end = first + 1
        while end < min(limit, len(sizes)) and sizes[end] >= least:
            end += 1
        yield first, end, size
        first = end


def _support_columns(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Column numbers of each row's support, (rows, size) padded with column 0, and where the padding is."""
    counts = mask.sum(1)
    is_padding = torch.arange(size, device=mask.device) >= counts[:, None]
    columns = torch.zeros(mask.shape[0], size, dtype=torch.int64, device=mask.device)
    columns[~is_padding] = mask.nonzero()[:, 1]  # both sides run row by row
    return columns, is_padding
