"""Scores of § 4.3 and the masks cut from them."""

from __future__ import annotations

import pytest
import torch

from tailor.errors import InvalidSetting, NotFinite, SingularGram
from tailor.gram import damp
from tailor.linalg import cholesky, inverse_factor
from tailor.masks import find_cut, top_fraction
from tailor.scores import fused_score, inverse_diagonal, minmax, salience, sensitivity


def test_scores_by_hand():
    delta = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    inverse = torch.tensor([0.5, 2.0])
    assert torch.equal(salience(delta), torch.tensor([[1.0, 2.0], [0.0, 4.0]]))
    assert torch.equal(sensitivity(delta, inverse), torch.tensor([[1.0, 1.0], [0.0, 4.0]]))
    expected = 0.25 * torch.tensor([[0.25, 0.5], [0.0, 1.0]]) + 0.75 * torch.tensor([[0.25, 0.25], [0.0, 1.0]])
    assert torch.allclose(fused_score(delta, inverse, 0.25), expected)


def test_minmax():
    assert torch.equal(minmax(torch.tensor([2.0, 6.0, 3.0])), torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(minmax(torch.full((3,), 5.0)), torch.zeros(3))
    assert minmax(torch.zeros(0)).shape == (0,)


def test_inverse_factor_and_diagonal_against_the_inverse(make_layer):
    gram = make_layer(0).gram
    inverse = gram.double().inverse()
    factor = inverse_factor(gram)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close((factor.T @ factor).double(), inverse, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(factor.double(), torch.linalg.cholesky(inverse).mT, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(inverse_diagonal(gram).double(), inverse.diagonal(), rtol=1e-3, atol=0)


def test_singular_grams_are_refused_by_name():
    torch.manual_seed(0)
    inputs = torch.randn(5, 12)
    for gram in (inputs.T @ inputs, torch.zeros(3, 3), torch.ones(2, 2), torch.diag(torch.tensor([1.0, 0.0]))):
        with pytest.raises(SingularGram, match=r"layer\.weight: .*raise the damping.*more samples"):
            inverse_diagonal(gram, "layer.weight")


def test_one_dependent_input_is_noticed():
    """Rounding makes about half of such Grams positive definite by a hair; that is not to be taken for information."""
    noticed = 0
    for seed in range(100):
        torch.manual_seed(seed)
        inputs = torch.randn(60, 12)
        inputs[:, 5] = inputs[:, 2] + inputs[:, 9]
        try:
            cholesky(inputs.T @ inputs, "gram")
        except SingularGram:
            noticed += 1
    assert noticed >= 95


def test_damping_makes_any_gram_usable():
    torch.manual_seed(0)
    inputs = torch.randn(8, 600)
    inputs[:, 0] = 1e3 * inputs[:, 1:].sum(1)  # far fewer tokens than inputs, and one channel above all others
    gram = damp(inputs.T @ inputs, 0.01)
    exact = gram.double().inverse().diagonal()
    torch.testing.assert_close(inverse_diagonal(gram).double(), exact, rtol=1e-3, atol=0)


def test_float64_takes_over_where_float32_fails(make_layer, monkeypatch):
    gram = make_layer(0).gram
    expected = cholesky(gram, "gram")
    factorise = torch.linalg.cholesky_ex

    def weak(matrices):
        factors, failures = factorise(matrices)
        return factors, failures + (matrices.dtype == torch.float32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", weak)
    factor = cholesky(gram, "gram")
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(3,), (1, 1), (17, 5), (40, 30), (0, 4)])
def test_exact_count_and_highest_scores(fraction, shape):
    torch.manual_seed(0)
    score = torch.randn(shape)
    mask = top_fraction(score, fraction)
    count = round(fraction * score.numel())
    expected = torch.zeros(score.numel(), dtype=torch.bool)
    expected[score.reshape(-1).argsort(descending=True)[:count]] = True
    assert torch.equal(mask, expected.view(shape))


def test_half_a_place_rounds_to_even():
    assert [int(top_fraction(torch.rand(n), 0.5).sum()) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]


@pytest.mark.parametrize("score", [torch.zeros(1000), torch.full((1000,), -3.5), torch.tensor([0.0, -0.0]).repeat(500)])
def test_equal_scores_are_spread_by_the_hash(score):
    mask = top_fraction(score, 0.3, seed=5)
    assert mask.sum() == 300
    assert 60 < mask[:250].sum() < 90  # about a third of any stretch
    assert torch.equal(mask, top_fraction(score, 0.3, seed=5))
    assert not torch.equal(mask, top_fraction(score, 0.3, seed=6))


def test_seeds_do_not_shift_one_mask():
    score = torch.zeros(4096)
    masks = torch.stack([top_fraction(score, 0.5, seed=seed) for seed in range(4)]).float() - 0.5
    for shift in range(-2, 3):
        assert (4 * (masks[0] * masks[1].roll(shift)).mean()).abs() < 0.1


def test_ties_in_bfloat16():
    torch.manual_seed(0)
    score = torch.rand(200, 100).bfloat16()
    mask = top_fraction(score, 0.1)
    threshold = score[mask].min()
    tied = score == threshold
    assert mask.sum() == 2000 and 0 < (mask & tied).sum() < tied.sum()
    assert torch.equal(mask | tied, score >= threshold)
    assert torch.equal(mask, top_fraction(score.float(), 0.1))


def test_a_mask_does_not_depend_on_global_randomness_or_layout():
    score = torch.arange(12.0).view(3, 4) // 3
    torch.manual_seed(1)
    first = top_fraction(score, 0.4)
    torch.manual_seed(2)
    assert torch.equal(first, top_fraction(score.T.contiguous().T, 0.4))


def test_extremes_and_signs_are_ordered():
    score = torch.tensor([-torch.inf, -1e-40, 0.0, 1e-40, 1.0, torch.inf, -1.0])
    for count in range(8):
        assert top_fraction(score, count / 7).sum() == count
    assert top_fraction(score, 3 / 7).tolist() == [False, False, False, True, True, True, False]


def test_last_comes_last():
    score = torch.zeros(10)
    delta = torch.tensor([0.0, 1e-30, 0, 0, 1e-30, 0, 0, 1e-30, 0, 0])
    assert torch.equal(top_fraction(score, 0.3, last=delta == 0), delta != 0)
    assert bool(top_fraction(score, 0.5, last=delta == 0)[delta != 0].all())


def test_joint_ranking_is_the_ranking_of_the_concatenation():
    torch.manual_seed(0)
    parts = [torch.randn(30).round(decimals=1), torch.randn(7, 4).round(decimals=1), torch.zeros(0), torch.ones(5)]
    cut = find_cut(lambda: iter(parts), 20, seed=9)
    masks, first = [], 0
    for part in parts:
        masks.append(cut.mask(part, first).reshape(-1))
        first += part.numel()
    joined = torch.cat([part.reshape(-1) for part in parts])
    assert torch.equal(torch.cat(masks), top_fraction(joined, 20 / joined.numel(), seed=9))


def test_refusals():
    with pytest.raises(InvalidSetting, match=r"fraction: 1\.5 is outside"):
        top_fraction(torch.rand(3), 1.5)
    with pytest.raises(NotFinite, match="1 of 3 entries are NaN"):
        top_fraction(torch.tensor([0.0, torch.nan, 1.0]), 0.5)
