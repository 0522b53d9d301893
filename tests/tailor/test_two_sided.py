"""Two-sided tailoring against float64 least squares row by row, by hand, and at its ends."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tailor.decorate import layer_error
from tailor.errors import InvalidSetting, SingularGram, TailorError
from tailor.fuse import fuse_to_patch, fused_tensors
from tailor.gram import GramAccumulator, Grams
from tailor.method import Fused, GramEvidence, Rng, sees_old_tasks
from tailor.methods.dare import Dare
from tailor.methods.released_code import ReleasedCode
from tailor.methods.tailor import Tailor
from tailor.methods.two_sided import TwoSided
from tailor.terms import Term, objective, optimal_compensation, relative_objective


def grams_of_inputs(inputs: dict[str, Tensor]) -> Grams:
    sums = {name: GramAccumulator(name) for name in inputs}
    for name, rows in inputs.items():
        sums[name].add(rows)
    return Grams.collect({name: name for name in inputs}, sums)


@pytest.fixture
def make_two_sided(make_model):
    """The toy model with Grams to retain beside those of the target."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0):
        model = make_model(dtype, seed=seed)
        generator = torch.Generator().manual_seed(100 + seed)
        inputs = {
            name: torch.randn(60, width, generator=generator) @ torch.randn(width, width, generator=generator)
            for name, width in (("first.weight", 6), ("second.weight", 10))
        }
        return dataclasses.replace(
            model, evidence=dataclasses.replace(model.evidence, retain=grams_of_inputs(inputs))
        ), inputs

    return make


def without_retain(evidence: GramEvidence) -> GramEvidence:
    return dataclasses.replace(evidence, retain=None)


def run(method, model, evidence: GramEvidence | None = None) -> dict[str, Fused]:
    scope = [name for name in model.pretrained if not name.startswith(("frozen", "position"))]
    pretrained = {name: model.pretrained[name] for name in scope}
    finetuned = {name: model.finetuned[name] for name in scope}
    return {f.name: f for f in method.fuse(pretrained, finetuned, evidence or model.evidence, Rng())}


def damped_in_float64(gram: Tensor, damping: float) -> Tensor:
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


@pytest.mark.parametrize("mu", [0.0, 0.03, 1.0, 30.0])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 1.0])
def test_against_stacked_least_squares(make_two_sided, sparsity, mu):
    """Row by row, min |(d - f)·R|² + mu |f·K|² with both roots stacked into one system for a general solver."""
    model, _ = make_two_sided()
    fused = run(TwoSided(sparsity, mu=mu, damping=0.02), model)
    for name in ("first.weight", "second.weight"):
        root = torch.linalg.cholesky(damped_in_float64(model.evidence.calibration[name], 0.02))
        retain = torch.linalg.cholesky(damped_in_float64(model.evidence.retain[name], 0.02))
        delta = model.finetuned[name].double() - model.pretrained[name].double()
        expected = torch.zeros_like(delta)
        for row, support in enumerate(fused[name].mask):
            if support.any():
                system = torch.cat([root[support].T, mu**0.5 * retain[support].T])
                wanted = torch.cat([delta[row] @ root, torch.zeros(len(retain), dtype=torch.float64)])
                expected[row, support] = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
        found = (fused[name].tensor.double() - model.pretrained[name].double()) * fused[name].mask
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("omega", [0.5, 1.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.7, 1.0])
def test_without_weight_it_is_exact_tailoring_bit_for_bit(make_two_sided, dtype, omega, sparsity):
    model, _ = make_two_sided(dtype)
    two_sided = run(TwoSided(sparsity, omega, mu=0.0), model)
    exact = run(Tailor(sparsity, omega, decorator="exact"), model, without_retain(model.evidence))
    assert two_sided.keys() == exact.keys()
    for name, fused in two_sided.items():
        assert torch.equal(fused.mask, exact[name].mask) and torch.equal(fused.tensor, exact[name].tensor)
        if "errors" in fused.facts:
            renamed = {tokens: dict(errors) for tokens, errors in exact[name].facts["errors"].items()}
            for errors in renamed.values():
                errors["two_sided"] = errors.pop("exact")
            assert fused.facts["errors"] == renamed


def test_in_float64_on_request(make_two_sided):
    model, _ = make_two_sided()
    single, double = (run(TwoSided(0.4, precision=precision), model) for precision in ("float32", "float64"))
    for name in ("first.weight", "second.weight"):
        assert double[name].facts["residual"] < 1e-12 < single[name].facts["residual"] < 1e-5
        torch.testing.assert_close(single[name].tensor, double[name].tensor, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidSetting, match=r"TwoSided\.precision = 'half' is none of float32, float64"):
        TwoSided(0.1, precision="half")


def test_one_input_by_hand():
    """H = 4, K = 1, delta 3 kept: f minimises 4 (3 - f)² + mu f², so f = 12 / (4 + mu)."""
    evidence = GramEvidence(
        grams_of_inputs({"w": torch.tensor([[2.0**0.5], [2.0**0.5]])}),
        retain=grams_of_inputs({"w": torch.tensor([[0.5**0.5]])}),
    )
    assert evidence.calibration["w"].item() == pytest.approx(4) and evidence.retain["w"].item() == pytest.approx(1)
    for mu, expected in ((0.0, 3.0), (2.0, 2.0), (8.0, 1.0)):
        method = TwoSided(1.0, mu=mu, damping=0.0)
        (fused,) = method.fuse({"w": torch.ones(1, 1)}, {"w": torch.full((1, 1), 4.0)}, evidence, Rng())
        assert fused.tensor.item() == pytest.approx(1 + expected)
        assert fused.facts["errors"]["calibration"]["two_sided"] == pytest.approx((1 - expected / 3) ** 2, abs=1e-6)
        assert fused.facts["drift"]["two_sided"] == pytest.approx((expected / 3) ** 2)
        assert fused.facts["drift"]["none"] == 1 and fused.facts["errors"]["calibration"]["none"] == 0


def test_inputs_that_no_sample_retains_are_free():
    """Retained samples never use the second input: only the first one's entry moves."""
    evidence = GramEvidence(
        grams_of_inputs({"w": torch.eye(2)}), retain=grams_of_inputs({"w": torch.tensor([[1.0, 0.0]])})
    )
    base, tuned = {"w": torch.zeros(1, 2)}, {"w": torch.tensor([[6.0, 6.0]])}
    (fused,) = TwoSided(1.0, mu=1.0, damping=0.0).fuse(base, tuned, evidence, Rng())
    assert torch.allclose(fused.tensor, torch.tensor([[2.0, 6.0]]))  # H = diag(1, 1), K = diag(2, 0)


def test_more_weight_drifts_less_and_errs_more(make_two_sided):
    model, _ = make_two_sided()
    for name in ("first.weight", "second.weight"):
        facts = [run(TwoSided(0.4, mu=mu), model)[name].facts for mu in (0.0, 0.1, 1.0, 10.0, 1e4)]
        drift = [fact["drift"]["two_sided"] for fact in facts]
        error = [fact["errors"]["calibration"]["two_sided"] for fact in facts]
        assert drift == sorted(drift, reverse=True) and drift[0] > 10 * drift[-1] and drift[-1] < 0.01
        assert error == sorted(error)


def test_the_mask_knows_the_target_alone(make_two_sided):
    model, _ = make_two_sided()
    plain = run(Tailor(0.3, 0.4), model, without_retain(model.evidence))
    for mu in (0.1, 10.0):
        for name, fused in run(TwoSided(0.3, 0.4, mu=mu), model).items():
            assert torch.equal(fused.mask, plain[name].mask)


def test_tensors_without_a_gram_are_as_in_tailor(make_two_sided):
    model, _ = make_two_sided()
    fused = run(TwoSided(0.3, mu=5.0), model)
    for name in ("embed.weight", "norm.weight", "second.bias"):
        assert fused[name].tensor is model.finetuned[name] and not fused[name].facts


def test_drift_is_that_of_the_written_weights_on_the_samples(make_two_sided):
    model, inputs = make_two_sided(torch.bfloat16)
    patch, report = fuse_to_patch(model.pretrained, model.finetuned, TwoSided(0.4), evidence=model.evidence)
    rows = {row.name: row for row in report.tensors}
    for name, written in patch.apply_to(model.pretrained):
        if name not in inputs:
            continue
        samples, base = inputs[name].double(), model.pretrained[name].double()
        moved = (samples @ (written.double() - base).T).square().sum()
        whole = (samples @ (model.finetuned[name].double() - base).T).square().sum()
        assert rows[name].facts["drift"]["rounded"] == pytest.approx(float(moved / whole), rel=1e-4)
        assert rows[name].facts["retain_token_count"] == 60 and rows[name].facts["token_count"] == 50


def test_report_compares_with_one_sided_decorators(make_two_sided):
    model, _ = make_two_sided()
    facts = run(TwoSided(0.4, mu=0.5, compare_decorators=True), model)["first.weight"].facts
    names = {"none", "sparsegpt", "exact", "two_sided", "rounded"}
    assert facts["drift"].keys() == facts["errors"]["calibration"].keys() == facts["errors"]["held_out"].keys() == names
    assert facts["errors"]["calibration"]["exact"] <= facts["errors"]["calibration"]["two_sided"]
    assert facts["drift"]["two_sided"] < facts["drift"]["exact"]
    _, report = fuse_to_patch(
        model.pretrained, model.finetuned, TwoSided(0.4, compare_decorators=True), evidence=model.evidence
    )
    assert report.to_json()["decorator_order"]["calibration"]["exact<=none"] == 2
    assert report.to_json()["settings"]["mu"] == 0.1
    assert report.sees_old_tasks and report.to_json()["sees_old_tasks"]


def test_who_sees_old_tasks(make_two_sided):
    assert sees_old_tasks(TwoSided(0.1)) and not sees_old_tasks(Tailor(0.1)) and not sees_old_tasks(Dare(0.1))
    model, _ = make_two_sided()
    for method, evidence, message in (
        (TwoSided(0.1), without_retain(model.evidence), "TwoSided needs Grams of samples to retain"),
        (TwoSided(0.1, mu=0.0), without_retain(model.evidence), "TwoSided needs Grams of samples to retain"),
        (TwoSided(0.1), None, "TwoSided needs Grams of the target task"),
        (Tailor(0.1), model.evidence, "Tailor uses no samples of old tasks"),
        (ReleasedCode(0.1), model.evidence, "ReleasedCode uses no samples of old tasks"),
        (Dare(0.1), model.evidence, "Dare uses no evidence"),
    ):
        with pytest.raises(TailorError, match=message):
            next(fused_tensors(model.pretrained, model.finetuned, method, evidence=evidence))


def test_grams_that_do_not_fit(make_two_sided):
    model, inputs = make_two_sided()
    for retain, message in (
        ({"first.weight": inputs["first.weight"]}, r"second\.weight: has a Gram of the target task, but none"),
        ({"first.weight": inputs["second.weight"]}, r"first\.weight: a Gram of shape \(10, 10\) does not fit"),
    ):
        evidence = dataclasses.replace(model.evidence, retain=grams_of_inputs(retain))
        with pytest.raises(TailorError, match=message):
            run(TwoSided(0.1), model, evidence)


def test_few_samples_to_retain_are_no_obstacle(make_two_sided):
    """Only the sum must be positive definite; one retained token is enough even without damping."""
    model, inputs = make_two_sided()
    one = grams_of_inputs({name: rows[:1] for name, rows in inputs.items()})
    run(TwoSided(0.3, damping=0.0), model, dataclasses.replace(model.evidence, retain=one))
    few = grams_of_inputs({name: rows[:2] for name, rows in inputs.items()})
    with pytest.raises(SingularGram, match=r"first\.weight: 2 tokens cannot tell 6 inputs apart"):
        run(TwoSided(0.3, damping=0.0), model, dataclasses.replace(model.evidence, calibration=few))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoSided(1.5), r"TwoSided\.sparsity = 1\.5"),
        (lambda: TwoSided(0.1, omega=2), r"TwoSided\.omega = 2"),
        (lambda: TwoSided(0.1, mu=-0.1), r"TwoSided\.mu = -0\.1 is outside"),
        (lambda: TwoSided(0.1, mu=float("nan")), r"TwoSided\.mu = nan"),
        (lambda: TwoSided(0.1, mu=float("inf")), r"TwoSided\.mu = inf"),
        (lambda: TwoSided(0.1, damping=-1), r"TwoSided\.damping = -1"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(InvalidSetting, match=message):
        make()


class TestTerms:
    def test_the_objective_by_hand(self):
        terms = [
            Term(torch.tensor([[3.0, 0.0]]), torch.diag(torch.tensor([2.0, 1.0]))),
            Term(torch.tensor([[0.0, 4.0]]), torch.diag(torch.tensor([1.0, 5.0])), 0.5),
        ]
        assert objective(terms, torch.zeros(1, 2)) == 18 + 0.5 * 80
        assert objective(terms, torch.tensor([[1.0, 4.0]])) == 2 * 4 + 16 + 0.5
        assert relative_objective(terms, torch.tensor([[1.0, 4.0]])) == 24.5 / 58

    def test_no_direction_improves_the_optimum(self, make_layer):
        layers = [make_layer(seed) for seed in range(3)]
        terms = [Term(layer.delta, layer.gram, weight) for layer, weight in zip(layers, (1.0, 0.3, 2.0), strict=True)]
        mask = torch.rand(layers[0].delta.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        best = optimal_compensation(terms, torch.zeros_like(mask, dtype=torch.float32), mask)
        slope = sum(t.weight * (best.double() - t.delta.double()) @ t.gram.double() for t in terms)
        scale = sum(t.weight * (t.delta.double() @ t.gram.double()).abs().max() for t in terms)
        assert slope[mask].abs().max() < 1e-4 * scale and not best[~mask].any()

    def test_where_it_starts_does_not_matter(self, make_layer):
        one, two = make_layer(0), make_layer(1)
        terms = [Term(one.delta, one.gram), Term(two.delta, two.gram)]
        mask = torch.rand(one.delta.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        start = torch.where(mask, one.delta, 0)
        from_zero = optimal_compensation(terms, torch.zeros_like(start), mask)
        from_start = start + optimal_compensation(terms, start, mask)
        torch.testing.assert_close(from_zero, from_start, rtol=1e-2, atol=1e-4)

    def test_a_term_without_weight_leaves_no_trace(self, make_layer):
        one, two = make_layer(0), make_layer(1)
        mask = one.delta.abs() > one.delta.abs().median()
        start = torch.where(mask, one.delta, 0)
        alone = optimal_compensation([Term(one.delta, one.gram)], start, mask)
        both = optimal_compensation([Term(one.delta, one.gram), Term(two.delta, two.gram, 0.0)], start, mask)
        assert torch.equal(alone, both)

    def test_nothing_to_compensate(self, make_layer):
        layer = make_layer(2)
        everything = torch.ones_like(layer.delta, dtype=torch.bool)
        terms = [Term(layer.delta, layer.gram)] * 2
        assert not optimal_compensation(terms, layer.delta, everything).any()
        assert not optimal_compensation(terms, 0 * layer.delta, ~everything).any()
        assert relative_objective([Term(0 * layer.delta, layer.gram)], 0 * layer.delta) == 0
        assert relative_objective([Term(0 * layer.delta, layer.gram)], layer.delta) == float("inf")
        assert relative_objective(terms, layer.delta) == layer_error(layer.delta, layer.delta, layer.gram) == 0
