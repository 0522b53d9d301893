"""Decorators against independent float64 references: least squares by row, and the optimal brain surgeon by column."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tailor.decorate import DECORATORS, decorate, layer_error
from tailor.errors import InvalidSetting, SingularGram
from tailor.masks import top_fraction


def least_squares(delta: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """Minimise |(d - f)·R|² row by row, where gram = R·Rᵀ, with a general solver."""
    root = torch.linalg.cholesky(gram.double())
    fused = torch.zeros_like(delta, dtype=torch.float64)
    for row in range(delta.shape[0]):
        support = mask[row]
        if support.any():
            target = delta[row].double() @ root
            fused[row, support] = torch.linalg.lstsq(root[support].T, target[:, None]).solution[:, 0]
    return fused


def brain_surgeon(delta: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """Left to right: revert an entry, update the later ones of its row with the inverse of what is left of the Gram."""
    fused = delta.double().clone()
    gram = gram.double()
    for column in range(delta.shape[1]):
        inverse = gram[column:, column:].inverse()
        for row in range(delta.shape[0]):
            if not mask[row, column]:
                fused[row, column:] -= fused[row, column].clone() / inverse[0, 0] * inverse[0]
    return fused * mask


def random_mask(seed: int, shape: torch.Size, share: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_exact_is_the_least_squares_solution(make_layer, seed, share):
    layer = make_layer(seed)
    mask = random_mask(seed, layer.delta.shape, share)
    fused = decorate(layer.delta, mask, layer.gram, "exact")
    expected = least_squares(layer.delta, mask, layer.gram)
    assert (fused.double() - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("inputs", [40, 130, 300])  # within a block of 128 columns, and over two and three
def test_sparsegpt_is_the_brain_surgeon_column_by_column(make_layer, inputs, share):
    layer = make_layer(inputs, outputs=6, inputs=inputs, tokens=2 * inputs)
    mask = random_mask(inputs, layer.delta.shape, share)
    fused = decorate(layer.delta, mask, layer.gram, "sparsegpt")
    expected = brain_surgeon(layer.delta, mask, layer.gram)
    assert (fused - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert ((fused - expected).norm(dim=1) <= 1e-4 * expected.norm(dim=1)).all()  # each row on its own scale
    assert (fused - layer.delta * mask).norm() > 0.1 * expected.norm()  # there was something to compensate


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_exact_errs_least(make_layer, seed, fraction):
    layer = make_layer(seed, outputs=16 + seed, inputs=20 + 9 * seed)
    mask = top_fraction(layer.delta.abs(), fraction)
    none, sparsegpt, exact = (
        layer_error(layer.delta, decorate(layer.delta, mask, layer.gram, how), layer.gram)
        for how in ("none", "sparsegpt", "exact")
    )
    assert exact <= sparsegpt * (1 + 1e-5) and exact <= none * (1 + 1e-5)
    assert 0 < exact < none < 1


def test_two_inputs_by_hand():
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    delta = torch.tensor([[4.0, 1.0], [4.0, 1.0], [4.0, 1.0]])
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    # Reverting the second entry moves the first by 1 * 1/2, reverting the first moves the second by 4 * 1/2.
    exact = torch.tensor([[4.5, 0.0], [0.0, 3.0], [0.0, 0.0]])
    assert torch.allclose(decorate(delta, mask, gram, "exact"), exact)
    # From left to right nothing is to the right of the second entry, so the first row is not compensated.
    assert torch.allclose(
        decorate(delta, mask, gram, "sparsegpt"), torch.tensor([[4.0, 0.0], [0.0, 3.0], [0.0, 0.0]]), atol=1e-6
    )
    assert torch.equal(decorate(delta, mask, gram, "none"), delta * mask)
    # D = (4, 1): 32 + 8 + 2 = 42. Lost are (-0.5, 1): 0.5 - 1 + 2 = 1.5; (4, -2): 32 - 16 + 8 = 24; and all of D.
    assert layer_error(delta[:1], exact[:1], gram) == pytest.approx(1.5 / 42)
    assert layer_error(delta, exact, gram) == pytest.approx((1.5 + 24 + 42) / 126)


@pytest.mark.parametrize("how", DECORATORS)
def test_independent_inputs_need_no_compensation(how):
    torch.manual_seed(0)
    delta = torch.randn(5, 200)
    mask = random_mask(0, delta.shape, 0.4)
    gram = torch.diag(torch.rand(200) + 0.1)
    assert torch.equal(decorate(delta, mask, gram, how), delta * mask)


@pytest.mark.parametrize("how", DECORATORS)
def test_full_and_empty_masks(make_layer, how):
    layer = make_layer(0)
    everything = torch.ones_like(layer.delta, dtype=torch.bool)
    assert torch.equal(decorate(layer.delta, everything, layer.gram, how), layer.delta)
    assert torch.equal(decorate(layer.delta, ~everything, layer.gram, how), torch.zeros_like(layer.delta))
    assert torch.equal(decorate(0 * layer.delta, everything, layer.gram, how), 0 * layer.delta)


@pytest.mark.parametrize("how", DECORATORS)
def test_rows_do_not_touch_each_other(make_layer, how):
    layer = make_layer(1)
    mask = random_mask(1, layer.delta.shape, 0.3)
    mask[0], mask[1] = True, False
    fused = decorate(layer.delta, mask, layer.gram, how)
    assert torch.equal(fused[0], layer.delta[0]) and not fused[1].any()
    for row in (0, 1, 2, 7):
        alone = decorate(layer.delta[row : row + 1], mask[row : row + 1], layer.gram, how)
        torch.testing.assert_close(alone[0], fused[row], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", DECORATORS)
def test_inputs_are_not_modified(make_layer, how):
    layer = make_layer(2)
    delta, gram, mask = layer.delta.clone(), layer.gram.clone(), random_mask(2, layer.delta.shape, 0.3)
    decorate(layer.delta, mask, layer.gram, how)
    assert torch.equal(delta, layer.delta) and torch.equal(gram, layer.gram)


def test_a_given_factor_is_used(make_layer):
    layer = make_layer(3)
    mask = random_mask(3, layer.delta.shape, 0.3)
    identity = torch.eye(layer.gram.shape[0])  # of inputs that have nothing to do with each other
    uncompensated = decorate(layer.delta, mask, layer.gram, "none")
    assert torch.equal(decorate(layer.delta, mask, layer.gram, "sparsegpt", factor=identity), uncompensated)
    assert not torch.equal(decorate(layer.delta, mask, layer.gram, "sparsegpt"), uncompensated)


def test_error_of_a_delta_without_effect():
    gram = torch.diag(torch.tensor([1.0, 0.0]))
    silent = torch.tensor([[0.0, 3.0]])
    assert layer_error(silent, 0 * silent, gram) == 0.0
    assert layer_error(silent, torch.tensor([[1.0, 0.0]]), gram) == math.inf
    assert layer_error(torch.tensor([[2.0, 0.0]]), silent, gram) == 1.0


@pytest.mark.parametrize("how", ["sparsegpt", "exact"])
def test_a_singular_gram_is_refused(how):
    inputs = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    delta = torch.ones(3, 30)
    mask = random_mask(0, delta.shape, 0.7)
    with pytest.raises(SingularGram, match=r"mlp\.weight: .*not positive definite.*raise the damping"):
        decorate(delta, mask, inputs.T @ inputs, how, name="mlp.weight")


def test_an_unknown_decorator_is_refused(make_layer):
    layer = make_layer(0)
    with pytest.raises(InvalidSetting, match="'ribbon' is unknown; choose one of none, sparsegpt, exact"):
        decorate(layer.delta, layer.delta > 0, layer.gram, "ribbon")
