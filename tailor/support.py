"""Least squares on a support: the one solver behind exact decoration and everything that has its form."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from tailor.errors import InvalidSetting, SingularGram
from tailor.linalg import MORE_EVIDENCE, checked_cholesky, rounding_noise
from tailor.systems import Systems, relative_residual, solve_systems

Precision = Literal["float32", "float64"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# Rows whose residual is larger are solved anew in float64. Damped by 1 %, random layers leave a tenth of this or less.
RESIDUAL_LIMIT = 1e-4

# Their number is the process's: layers that are fused at the same time must not change it under each other.
_THREADS_OF_TORCH = threading.Lock()

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Solution(NamedTuple):
    """What `solve` found: `values`, (out, in), and how well they satisfy the equations.

    `residual` is the largest over rows of |(gram·x - rhs)_S| / |rhs_S|, S being the row's support.
    """

    values: Tensor
    residual: float


def solve_on_support(
    gram: Tensor,
    rhs: Tensor,
    mask: Tensor,
    *,
    name: str = "",
    precision: Precision = "float32",
    workspace_bytes: int | None = None,
) -> Tensor:
    """The values of `solve`: row by row, the minimiser of ½ x·gram·xᵀ - rhs·x over x that is zero off the mask."""
    return solve(gram, rhs, mask, name=name, precision=precision, workspace_bytes=workspace_bytes).values


@torch.no_grad()
def solve(
    gram: Tensor,
    rhs: Tensor,
    mask: Tensor,
    *,
    name: str = "",
    precision: Precision = "float32",
    workspace_bytes: int | None = None,
) -> Solution:
    """Row by row, the minimiser of ½ x·gram·xᵀ - rhs·x over x that is zero off the mask: x_S = (gram_SS)⁻¹ rhs_S.

    `gram` is (in, in), symmetric, positive definite on every support; `rhs` and `mask` (bool) are (out, in). The values
    have the dtype of `gram`, and are exactly zero off the mask. `precision` is the least that is computed in; rows that
    float32 leaves with a residual above RESIDUAL_LIMIT, or where it breaks down, are solved anew in float64. A residual
    in float64 is that of the values before they are rounded to the dtype of `gram`.

    Rows of full support share one Cholesky factor; the others are sorted by support size and solved in batches of about
    `workspace_bytes` bytes each (a larger system runs alone; by default 16 MiB on a CPU, where batches run in parallel
    and should fit its caches, else 1 GiB). Raises SingularGram naming the layer `name` if a Gram on a support is not
    positive definite to the precision of its dtype, or if even float64 leaves a residual above the limit.
    """
    if precision not in PRECISIONS:
        raise InvalidSetting(f"precision: {precision!r} is none of {', '.join(PRECISIONS)}")
    place = f"{name}: the Gram" if name else "the Gram"
    if workspace_bytes is None:
        workspace_bytes = 2**24 if gram.device.type == "cpu" else 2**30
    noise = rounding_noise(gram.diagonal())
    dtype = torch.float64 if precision == "float64" else gram.dtype
    first = _Equations(gram.to(dtype).contiguous(), rhs.to(dtype), mask, noise)
    values, residuals = first.solve(workspace_bytes)
    bad = (~(residuals <= RESIDUAL_LIMIT)).nonzero()[:, 0]
    if len(bad) and dtype == torch.float32:
        again = _Equations(first.gram.double(), first.rhs[bad].double(), mask[bad], noise)
        anew, better = again.solve(workspace_bytes)
        values[bad], residuals[bad] = anew.float(), better.float()
        bad = bad[~(better <= RESIDUAL_LIMIT)]
    if len(bad):
        worst = bad[residuals[bad].argmax()]
        where = f"{place} on a support of {int(mask[worst].sum())} of {len(gram)} inputs"
        if not residuals[worst].isfinite():
            raise SingularGram(
                f"{where} is not positive definite, so some inputs cannot be told apart; {MORE_EVIDENCE}"
            )
        found = f"a residual of {float(residuals[worst]):.1e}, above {RESIDUAL_LIMIT:g}, even in float64"
        raise SingularGram(f"{where} leaves {found}; {MORE_EVIDENCE}")
    return Solution(values.to(gram.dtype), float(residuals.max()) if len(residuals) else 0.0)


class _Equations(NamedTuple):
    """As in `solve`, all of one dtype; `noise`, (in,), is what squared pivots must exceed."""

    gram: Tensor
    rhs: Tensor
    mask: Tensor
    noise: Tensor

    def solve(self, workspace_bytes: int) -> tuple[Tensor, Tensor]:
        """Values, (out, in), zero off the mask, and each row's residual, (out,), infinite where a pivot is noise."""
        width = self.gram.shape[0]
        values = self.rhs.new_zeros(self.rhs.shape)  # contiguous, whatever the right-hand side is
        sizes = self.mask.sum(1)
        residuals = self.rhs.new_zeros(len(sizes))
        by_size = sizes.argsort(descending=True, stable=True)
        by_size = by_size[(sizes[by_size] > 0) & (sizes[by_size] < width)]
        counts = sizes[by_size]
        numbers = counts.tolist()

        def run(cut: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            first, end = cut
            systems = Systems.of(self.mask, by_size[first:end], counts[first:end], numbers[first], numbers[end - 1])
            solution, residual = solve_systems(self.gram, systems, self.rhs, self.noise)
            is_real = ~systems.is_padding()
            places = systems.columns + systems.rows[:, None] * width
            return places[is_real], solution[is_real], systems.rows, residual

        workspace = workspace_bytes // self.gram.element_size()
        cuts = list(_cuts(numbers, workspace))
        # Below two batches' worth of work, threads wait for each other longer than they compute.
        is_large = sum(size * size for size in numbers) > workspace
        for places, solution, rows, residual in _in_parallel(run, cuts, self.gram.device if is_large else None):
            values.view(-1)[places] = solution
            residuals[rows] = residual

        full = (sizes == width).nonzero()[:, 0]
        if len(full):
            factor, is_sound = checked_cholesky(self.gram, self.noise)
            target = self.rhs[full]
            values[full] = torch.cholesky_solve(target.T, factor).T
            residual = relative_residual(values[full] @ self.gram - target, target)
            residuals[full] = residual.masked_fill_(~is_sound, torch.inf)
        return values, residuals


def _cuts(sizes: list[int], workspace: int) -> Iterator[tuple[int, int]]:
    """Cut descending sizes into (first, end); padding stays within a sixteenth (or 16 places) a row.

    `workspace` is in entries; a system takes the square of its size for the factor, and half as much as gathered.
    """
    first = 0
    while first < len(sizes):
        size = sizes[first]
        limit = first + max(1, 2 * workspace // (3 * size * size))
        least = size - max(16, size // 16)
        end = first + 1
        while end < min(limit, len(sizes)) and sizes[end] >= least:
            end += 1
        yield first, end
        first = end


def _in_parallel(
    run: Callable[[_Item], _Result], items: Iterable[_Item], device: torch.device | None
) -> Iterable[_Result]:
    """`run` over the items, if `device` is a CPU in as many threads as torch may use, each computing by itself.

    LAPACK and gathers do not share out small matrices among threads, and what does would wait for the slowest at every
    step. Each item is computed by one thread in any case, so the results do not depend on how many there are.
    """
    items = list(items)
    if device is None or device.type != "cpu" or len(items) < 2:
        return [run(item) for item in items]
    with _THREADS_OF_TORCH:
        thread_count = torch.get_num_threads()
        torch.set_num_threads(1)  # also for threads that start from here on
        try:
            with ThreadPoolExecutor(thread_count) as pool:
                return list(pool.map(torch.no_grad()(run), items))
        finally:
            torch.set_num_threads(thread_count)
