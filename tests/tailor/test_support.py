"""The solver on supports against float64, row by row, and what it does where float32 is not enough."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tailor.errors import InvalidSetting, SingularGram
from tailor.support import RESIDUAL_LIMIT, solve, solve_on_support


def random_mask(seed: int, shape: torch.Size, share: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def least_squares(gram: Tensor, rhs: Tensor, mask: Tensor) -> Tensor:
    """x_S = (gram_SS)⁻¹ rhs_S in float64, one row after the other."""
    values = torch.zeros(rhs.shape, dtype=torch.float64)
    for row, on in enumerate(mask):
        values[row, on] = torch.linalg.solve(gram[on][:, on].double(), rhs[row, on].double())
    return values


def with_spectrum(eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
    """A Gram of these eigenvalues (float64), symmetric to the bit, and its eigenvectors as columns."""
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double())
    gram = vectors * eigenvalues @ vectors.T
    return (gram + gram.T) / 2, vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("workspace_bytes", [1, 10**5, 10**9])
@pytest.mark.parametrize("width", [30, 75])  # of one or two blocks of the factor, and of up to five
def test_solver_on_supports_of_every_size(dtype, workspace_bytes, width):
    torch.manual_seed(0)
    root = torch.randn(width, 2 * width, dtype=torch.float64)
    gram = root @ root.T
    rhs = torch.randn(2 * (width + 1), width, dtype=torch.float64)
    mask = torch.zeros(rhs.shape, dtype=torch.bool)
    for row in range(rhs.shape[0]):
        mask[row, torch.randperm(width)[: row // 2]] = True
    solution = solve_on_support(gram.to(dtype), rhs.to(dtype), mask, workspace_bytes=workspace_bytes)
    assert solution.dtype == dtype and not solution[~mask].any()
    for row in range(rhs.shape[0]):
        on = mask[row]
        expected = torch.linalg.solve(gram[on][:, on], rhs[row, on])
        torch.testing.assert_close(
            solution[row, on].double(), expected, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-5
        )


def test_solver_names_layer_and_support_size():
    gram = torch.ones(4, 4)
    mask = torch.tensor([[True, False, False, False], [True, True, True, False]])
    with pytest.raises(SingularGram, match=r"q\.weight: the Gram on a support of 3 of 4 inputs"):
        solve_on_support(gram, torch.ones(2, 4), mask, name="q.weight")
    assert torch.equal(solve_on_support(gram, torch.ones(1, 4), mask[:1]), torch.tensor([[1.0, 0, 0, 0]]))
    assert solve_on_support(gram, torch.ones(0, 4), mask[:0]).shape == (0, 4)


def test_outputs_are_the_optimum_to_four_digits(make_layer):
    layer = make_layer(3, outputs=60, inputs=260, tokens=600)
    mask = random_mask(3, layer.delta.shape, 0.4)
    rhs = layer.delta @ layer.gram
    expected = least_squares(layer.gram, rhs, mask)
    lost = layer.inputs.double() @ (solve_on_support(layer.gram, rhs, mask).double() - expected).T
    assert (lost.norm(dim=0) <= 1e-4 * (layer.inputs.double() @ expected.T).norm(dim=0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neither_threads_nor_batches_change_the_result(make_layer, dtype):
    layer = make_layer(6, outputs=50, inputs=120, tokens=400)
    gram, delta = layer.gram.to(dtype), layer.delta.to(dtype)
    mask = random_mask(6, delta.shape, 0.5)
    mask[3], mask[4] = True, False
    alone = solve(gram, delta @ gram, mask)
    torch.set_num_threads(3)
    together = solve(gram, delta @ gram, mask)
    assert torch.get_num_threads() == 3
    torch.testing.assert_close(alone.values, together.values, rtol=1e-5, atol=0)
    torch.set_num_threads(1)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for row in range(len(mask)):
        values = solve_on_support(gram, (delta @ gram)[row : row + 1], mask[row : row + 1])
        assert (values[0] - alone.values[row]).norm() <= tolerance * values.norm()


def test_inference_mode_and_threads(make_layer):
    layer = make_layer(7, outputs=50, inputs=60)
    mask = random_mask(7, layer.delta.shape, 0.5)
    expected = solve_on_support(layer.gram, layer.delta @ layer.gram, mask)
    torch.set_num_threads(2)
    with torch.inference_mode():
        values = solve_on_support(layer.gram.clone(), layer.delta @ layer.gram, mask)
    assert torch.allclose(values, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_residual_is_that_of_the_worst_row(make_layer, precision):
    layer = make_layer(8)
    mask = random_mask(8, layer.delta.shape, 0.4)
    mask[0], mask[1] = False, True
    rhs = layer.delta @ layer.gram
    rhs[2] = 0  # nothing asked for, nothing left
    values, residual = solve(layer.gram.double(), rhs.double(), mask, precision=precision)
    assert residual < 1e-12
    values, residual = solve(layer.gram, rhs, mask, precision=precision)
    assert values.dtype == torch.float32 and not values[2].any()
    left = ((values.double() @ layer.gram.double() - rhs.double()) * mask).norm(dim=1)
    worst = (left / (rhs.double() * mask).norm(dim=1).clamp(min=1e-30)).max()
    if precision == "float64":  # the residual before rounding to float32
        assert residual < 1e-12 < worst
    else:
        assert worst / 3 <= residual <= worst * 3  # float32 cannot tell its own last digits
    assert solve(layer.gram, rhs, torch.zeros_like(mask)).residual == 0


def test_rows_that_float32_cannot_solve_are_solved_in_float64():
    """Asked for along the smallest eigenvector, a solution is large, and so is what its last digits do to the rest."""
    gram, vectors = with_spectrum(torch.logspace(0, -5, 40, dtype=torch.float64))
    rhs = torch.stack([vectors[:, -1], vectors[:, 0]])
    mask = torch.ones(2, 41, dtype=torch.bool)
    mask[:, -1] = False  # one input more, so that no support is full
    gram = torch.block_diag(gram, torch.ones(1, 1, dtype=torch.float64)).float()
    rhs = torch.nn.functional.pad(rhs, (0, 1)).float()
    in_float32 = torch.linalg.solve(gram[:-1, :-1], rhs[0, :-1])
    left = (gram[:-1, :-1] @ in_float32 - rhs[0, :-1]).norm() / rhs[0].norm()
    assert left > 3 * RESIDUAL_LIMIT
    values, residual = solve(gram, rhs, mask)
    assert residual < RESIDUAL_LIMIT
    torch.testing.assert_close(values.double(), least_squares(gram, rhs, mask), rtol=1e-6, atol=1e-2)
    both = solve(gram, rhs, torch.ones_like(mask))  # full supports share a factor, and are checked alike
    assert both.residual < RESIDUAL_LIMIT
    torch.testing.assert_close(both.values, values, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equations_that_stay_unsolved_are_refused(dtype):
    gram = torch.tensor([[2.0, 1.0, 0.0], [0.5, 2.0, 0.0], [0.0, 0.0, 1.0]], dtype=dtype)  # not symmetric
    mask = torch.tensor([[True, True, False]])
    with pytest.raises(
        SingularGram, match=r"o\.weight: .* 2 of 3 inputs leaves a residual of .*e-0\d.* even in float64; "
    ):
        solve_on_support(gram, torch.ones(1, 3, dtype=dtype), mask, name="o.weight")
    with pytest.raises(SingularGram):
        solve_on_support(torch.full_like(gram, torch.nan), torch.ones(1, 3, dtype=dtype), mask)


def test_any_layout_will_do(make_layer):
    layer = make_layer(9)
    mask = random_mask(9, layer.delta.shape, 0.4)
    rhs = layer.delta @ layer.gram
    expected = solve_on_support(layer.gram, rhs, mask)
    wide = torch.cat([layer.gram, layer.gram], 1)[:, : len(layer.gram)]
    turned = (each.T.contiguous().T for each in (rhs, mask))
    torch.testing.assert_close(solve_on_support(wide, *turned), expected)


def test_an_unknown_precision_is_refused():
    with pytest.raises(InvalidSetting, match="'float16' is none of float32, float64"):
        solve_on_support(torch.eye(2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), precision="float16")


def test_two_terms_in_the_normal_equations(make_layer):
    """The general form: sum of Grams, sum of delta·Gram. Here the second term holds outputs where they were."""
    target, other = make_layer(4), make_layer(5)
    mask = random_mask(4, target.delta.shape, 0.2)
    total = target.gram.double() + 0.5 * other.gram.double()
    fused = solve_on_support(total, target.delta.double() @ target.gram.double(), mask)
    gradient = fused @ total - target.delta.double() @ target.gram.double()
    assert gradient[mask].abs().max() < 1e-10
