"""Many small systems cut out of one large matrix, solved by a blocked Cholesky factorisation, a batch at a time.

LAPACK factors small matrices one by one and far below the speed of a matrix product, and gathering a whole submatrix
costs as much again. Here the upper factor is built a few rows at a time, for all systems of a batch together: only the
upper half is gathered, and nearly all arithmetic is batched matrix products.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Systems(NamedTuple):
    """Systems gram[columns, columns]·x = rhs[columns], one for each of `rows`, padded to a common size.

    `columns` is (rows, size) in ascending order, its last places padding where `counts`, (rows,), are below `size`;
    `least_count` is the least of the counts.
    """

    rows: Tensor
    columns: Tensor
    counts: Tensor
    least_count: int

    @classmethod
    def of(cls, mask: Tensor, rows: Tensor, counts: Tensor, size: int, least_count: int) -> Systems:
        """The systems of `rows` of the bool `mask`, (out, in), which hold `counts` columns each, at most `size`."""
        supports = mask[rows].nonzero()[:, 1]  # row by row
        if least_count == size:
            return cls(rows, supports.view(-1, size), counts, size)
        systems = cls(rows, supports.new_zeros(len(rows), size), counts, least_count)
        systems.columns[~systems.is_padding()] = supports
        return systems

    def is_padding(self, first: int = 0) -> Tensor:
        """Which places from `first` on are padding, (rows, size - first)."""
        places = torch.arange(first, self.columns.shape[1], device=self.columns.device)
        return places >= self.counts[:, None]


def solve_systems(gram: Tensor, systems: Systems, rhs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The solutions, (rows, size), 0 at padding, and the `relative_residual` of each, (rows,).

    `gram` is (in, in), contiguous, symmetric; `rhs`, (out, in), holds the right-hand sides of all rows of the mask. If
    a squared pivot is not above the `noise`, (in,), of its column, it means nothing and its residual is infinite.
    """
    width, (count, size), low = gram.shape[0], systems.columns.shape, systems.least_count
    # Half the traffic of 64 bits, where the places of the Gram can be counted in 32.
    columns = systems.columns.to(torch.int32 if gram.numel() < 2**31 else torch.int64)
    row_starts = columns * width
    is_padding = systems.is_padding(low)
    target = rhs[systems.rows].gather(1, systems.columns)
    target[:, low:].masked_fill_(is_padding, 0)

    step = _block_size(size)
    identity = torch.eye(step, dtype=gram.dtype, device=gram.device)
    # U with UᵀU = the system; the last column holds U⁻ᵀ·rhs, which comes out as the columns of U do.
    upper = gram.new_empty(count, size, size + 1)
    blocks, inverses, pivots, failures = [], [], [], []
    for first in range(0, size, step):
        end = min(first + step, size)
        block = _gather(gram, row_starts[:, first:end], columns[:, first:], target[:, first:end])
        _neutralise(block, is_padding, first, end, low)
        blocks.append(block)
        if first:
            block = block.baddbmm(upper[:, :first, first:end].mT, upper[:, :first, first:], alpha=-1)
        corner, failure = torch.linalg.cholesky_ex(block[:, :, : end - first])
        eye = identity[: end - first, : end - first].expand_as(corner)
        inverse = torch.linalg.solve_triangular(corner, eye, upper=False)
        upper[:, first:end, first:] = inverse.bmm(block)
        inverses.append(inverse)
        pivots.append(corner.diagonal(dim1=1, dim2=2))
        failures.append(failure)

    is_clear = torch.cat(pivots, 1).square_() > noise[systems.columns]
    is_clear[:, low:] |= is_padding
    is_sound = is_clear.all(1) & (torch.stack(failures) == 0).all(0)

    solution = gram.new_empty(count, size)
    for first, inverse in zip(reversed(range(0, size, step)), reversed(inverses), strict=True):
        end = first + inverse.shape[1]
        rest = upper[:, first:end, size] - _times(upper[:, first:end, end:size], solution[:, end:])
        solution[:, first:end] = _times_transposed(inverse, rest)
    lost = _product(blocks, solution).sub_(target)
    return solution, relative_residual(lost, target).masked_fill_(~is_sound, torch.inf)


def relative_residual(lost: Tensor, target: Tensor) -> Tensor:
    """|lost| / |target| of each row, 0 where both are 0."""
    norm = target.norm(dim=1)
    lost_norm = lost.norm(dim=1)
    return torch.where((lost_norm == 0) & (norm == 0), 0, lost_norm / norm)


def _product(blocks: list[Tensor], solution: Tensor) -> Tensor:
    """The systems, as gathered, times the solutions, (rows, size)."""
    product = torch.zeros_like(solution)
    first = 0
    for block in blocks:
        end = first + block.shape[1]
        product[:, first:end] += _times(block[:, :, :-1], solution[:, first:])
        product[:, end:] += _times_transposed(block[:, :, end - first : -1], solution[:, first:end])
        first = end
    return product


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return torch.linalg.vecdot(matrices, vectors[:, None, :])  # several times as fast as products with one column


def _times_transposed(matrices: Tensor, vectors: Tensor) -> Tensor:
    return vectors[:, None, :].bmm(matrices)[:, 0]


def _gather(gram: Tensor, row_starts: Tensor, columns: Tensor, rhs: Tensor) -> Tensor:
    """Rows of systems from their diagonal on, and the right-hand side as one more column."""
    count, height, length = len(columns), row_starts.shape[1], columns.shape[1]
    places = (row_starts[:, :, None] + columns[:, None, :]).view(-1)
    block = gram.new_empty(count, height, length + 1)
    block[:, :, :-1] = gram.view(-1).index_select(0, places).view(count, height, length)
    block[:, :, -1] = rhs
    return block


def _neutralise(block: Tensor, is_padding: Tensor, first: int, end: int, low: int) -> None:
    """Make each padded place, which lies at `low` or after, an equation of its own: a row and column of identity."""
    if not is_padding.shape[1]:
        return
    start = max(first, low)
    block[:, :, start - first : -1].masked_fill_(is_padding[:, None, start - low :], 0)
    if end > low:
        padded_rows = is_padding[:, start - low : end - low]
        block[:, start - first :].masked_fill_(padded_rows[:, :, None], 0)
        block.diagonal(dim1=1, dim2=2)[:, start - first :].add_(padded_rows)


def _block_size(size: int) -> int:
    """Rows of the factor built at once: enough for efficient products, few enough to leave LAPACK little to do."""
    return max(16, 8 * round(math.sqrt(size) / 5))
