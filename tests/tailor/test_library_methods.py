"""What every method promises, and what each one computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tailor.decorate import DECORATORS, decorate, layer_error
from tailor.errors import InvalidSetting, NotFinite, ScopeError, SingularGram, TailorError
from tailor.fuse import fuse_to_patch, fused_tensors
from tailor.gram import GramAccumulator, Grams, damp
from tailor.masks import top_fraction
from tailor.method import Fused, GramEvidence, Method, Rng, difference
from tailor.methods.dare import Dare
from tailor.methods.finetune import FineTune
from tailor.methods.grafting import Grafting
from tailor.methods.magnitude import Magnitude
from tailor.methods.released_code import ReleasedCode
from tailor.methods.tailor import Tailor
from tailor.methods.wise_ft import WiseFT
from tailor.methods.zero_shot import ZeroShot
from tailor.scores import fused_score, inverse_diagonal

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class QuadraticTask:
    """Loss = half the squared distance to `goal`, in the directions where `matters`; the score is minus the loss."""

    def __init__(self, goal: Mapping[str, Tensor]) -> None:
        self.goal = goal
        self.scored = 0

    def gradient(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: weights[name].float() - self.goal[name].float() for name in weights}

    def score(self, weights: Mapping[str, Tensor]) -> float:
        self.scored += 1
        return -sum(float((weights[name].float() - self.goal[name].float()).square().sum()) / 2 for name in weights)


def evidence_for(method: Method, model):
    kinds = {"nothing": None, "grams": model.evidence, "gradients": QuadraticTask(model.finetuned)}
    return kinds[method.needs]


def run(method: Method, model, seed: int = 0) -> dict[str, Fused]:
    scope = [name for name in model.pretrained if not name.startswith(("frozen", "position"))]
    pretrained = {name: model.pretrained[name] for name in scope}
    finetuned = {name: model.finetuned[name] for name in scope}
    return {f.name: f for f in method.fuse(pretrained, finetuned, evidence_for(method, model), Rng(seed))}


def at(sparsity: float) -> list[Method]:
    return [
        Dare(sparsity),
        Magnitude(sparsity),
        Magnitude(sparsity, ranking="global"),
        Grafting(sparsity, steps=2),
        *(Tailor(sparsity, decorator=decorator) for decorator in DECORATORS),
        Tailor(sparsity, omega=1.0, decorator="exact", compare_decorators=True),
        ReleasedCode(sparsity, reset=("first.bias",), keep_finetuned=()),
    ]


EVERY_METHOD = [ZeroShot(), FineTune(), WiseFT(), WiseFT(alpha=0.0), WiseFT(alpha=1.0), *at(0.0), *at(0.3), *at(1.0)]


@pytest.mark.parametrize("method", EVERY_METHOD, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(make_model, method, dtype):
    model = make_model(dtype)
    before = {name: tensor.clone() for name, tensor in (model.pretrained | model.finetuned).items()}
    patch, report = fuse_to_patch(model.pretrained, model.finetuned, method, evidence=evidence_for(method, model))
    fused = {**model.pretrained, **dict(patch.apply_to(model.pretrained))}
    rows = {row.name: row for row in report.tensors}
    assert set(rows) == set(model.pretrained)
    for name, yielded in run(method, model).items():
        mask = torch.ones_like(fused[name], dtype=torch.bool) if yielded.mask is None else yielded.mask
        changed = fused[name].view(torch.uint8) != model.pretrained[name].view(torch.uint8)
        changed = changed.reshape(*fused[name].shape, -1).any(-1)
        assert not (changed & ~mask).any()
        assert fused[name].dtype == dtype
        assert rows[name].mask_count == int(mask.sum()) and rows[name].changed_count == int(changed.sum())
        assert rows[name].fate == "fused"
        torch.testing.assert_close(fused[name][mask], yielded.tensor[mask].to(dtype), rtol=0, atol=0)
    assert rows["frozen.weight"].fate == rows["position_ids"].fate == "copied"
    assert torch.equal(fused["frozen.weight"], model.pretrained["frozen.weight"])
    assert all(torch.equal(tensor, (model.pretrained | model.finetuned)[name]) for name, tensor in before.items())


@pytest.mark.parametrize("method", EVERY_METHOD, ids=repr)
def test_methods_are_immutable_and_repeatable(make_model, method):
    fields = dataclasses.fields(method)
    if fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, fields[0].name, 0.2)
    model = make_model()
    first, second = run(method, model), run(method, model)
    assert all(torch.equal(first[name].tensor, second[name].tensor) for name in first)
    backwards = dataclasses.replace(
        model,
        pretrained=dict(reversed(model.pretrained.items())),
        finetuned=dict(reversed(model.finetuned.items())),
    )
    for name, yielded in run(method, backwards).items():
        assert (yielded.mask is None) == (first[name].mask is None)
        assert yielded.mask is None or torch.equal(yielded.mask, first[name].mask)


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("decorator", DECORATORS)
def test_ends_of_the_sparsity_scale(make_model, dtypes, decorator):
    model = make_model(*dtypes)
    for end, weights in ((0.0, model.pretrained), (1.0, model.finetuned)):
        for method in (Dare(end), Magnitude(end), Magnitude(end, "global"), Tailor(end, decorator=decorator)):
            patch, _ = fuse_to_patch(model.pretrained, model.finetuned, method, evidence=evidence_for(method, model))
            fused = {**model.pretrained, **dict(patch.apply_to(model.pretrained))}
            for name in ("embed.weight", "first.weight", "first.bias", "second.weight", "second.bias"):
                assert torch.equal(fused[name], weights[name].to(dtypes[0]))
                assert fused[name].dtype == dtypes[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dare(1.1), r"Dare\.sparsity = 1\.1 is outside \[0, 1\]"),
        (lambda: Magnitude(-0.1), r"Magnitude\.sparsity = -0\.1"),
        (lambda: Magnitude(0.1, ranking="local"), r"Magnitude\.ranking = 'local' is none of per_tensor, global"),
        (lambda: WiseFT(alpha=2), r"WiseFT\.alpha = 2"),
        (lambda: Tailor(float("nan")), r"Tailor\.sparsity = nan"),
        (lambda: Tailor(0.1, omega=-1), r"Tailor\.omega = -1"),
        (lambda: Tailor(0.1, decorator="lace"), r"Tailor\.decorator = 'lace' is none of none, sparsegpt, exact"),
        (lambda: Tailor(0.1, damping=-0.1), r"Tailor\.damping = -0\.1"),
        (lambda: Tailor("0.1"), r"Tailor\.sparsity = '0\.1'"),
        (lambda: Grafting(0.1, steps=-1), r"Grafting\.steps = -1"),
        (lambda: Grafting(0.1, steps=1.5), r"Grafting\.steps = 1\.5 is not a whole number"),
        (lambda: ReleasedCode(2), r"ReleasedCode\.sparsity = 2"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(InvalidSetting, match=message):
        make()


def test_evidence_of_the_wrong_kind(make_model):
    model = make_model()
    for method, evidence, message in (
        (Dare(0.1), model.evidence, "Dare uses no evidence"),
        (Tailor(0.1), None, "Tailor needs Grams"),
        (ReleasedCode(0.1), QuadraticTask({}), "ReleasedCode needs Grams"),
        (Grafting(0.1), model.evidence, "Grafting needs gradients"),
        (Grafting(0.1), None, "Grafting needs gradients"),
    ):
        with pytest.raises(TailorError, match=message):
            list(fused_tensors(model.pretrained, model.finetuned, method, evidence=evidence))
        with pytest.raises(TailorError, match=message):
            next(iter(method.fuse(model.pretrained, model.finetuned, evidence, Rng())))


def test_delta_is_taken_after_casting_the_base():
    base = torch.tensor([1.0001, 1.0, 2.0])  # the first rounds to 1 in bfloat16
    tuned = torch.tensor([1.0, 1.0078125, 2.0]).bfloat16()
    assert torch.equal(difference(base, tuned), torch.tensor([0.0, 0.0078125, 0.0]))


def test_wise_ft_by_hand():
    base, tuned = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 0.0])}
    (fused,) = WiseFT(alpha=0.25).fuse(base, tuned, None, Rng())
    assert torch.equal(fused.tensor, torch.tensor([1.5, 1.5]))


def test_dare_keeps_the_expected_share_and_mean():
    base, tuned = {"w": torch.zeros(200, 200)}, {"w": torch.ones(200, 200)}
    (fused,) = Dare(0.2).fuse(base, tuned, None, Rng(1))
    assert abs(fused.mask.float().mean() - 0.2) < 0.01
    assert torch.equal(fused.tensor[fused.mask], torch.full((int(fused.mask.sum()),), 5.0))
    (again,) = Dare(0.2).fuse(base, tuned, None, Rng(2))
    assert not torch.equal(fused.mask, again.mask)


def test_magnitude_by_hand():
    base = {"a": torch.zeros(4), "b": torch.zeros(2, 2)}
    tuned = {"a": torch.tensor([1.0, -4.0, 2.0, 0.5]), "b": torch.tensor([[3.0, 8.0], [-7.0, 6.0]])}
    local = {f.name: f.mask.tolist() for f in Magnitude(0.5).fuse(base, tuned, None, Rng())}
    assert local == {"a": [False, True, True, False], "b": [[False, True], [True, False]]}
    joint = {f.name: f.mask.tolist() for f in Magnitude(0.5, "global").fuse(base, tuned, None, Rng())}
    assert joint == {"a": [False, True, False, False], "b": [[False, True], [True, True]]}


def test_tailor_is_its_parts(make_model):
    model = make_model()
    method = Tailor(0.2, omega=0.3, decorator="exact", damping=0.05)
    fused = run(method, model)
    for name in ("first.weight", "second.weight"):
        gram = damp(model.evidence.calibration[name], 0.05)
        delta = difference(model.pretrained[name], model.finetuned[name])
        score = fused_score(delta, inverse_diagonal(gram), 0.3)
        mask = top_fraction(score, 0.2, seed=Rng(0).seed(name))
        expected = model.pretrained[name] + decorate(delta, mask, gram, "exact")
        assert torch.equal(fused[name].mask, mask)
        torch.testing.assert_close(fused[name].tensor[mask], expected[mask], rtol=1e-5, atol=1e-6)
    for name in ("embed.weight", "norm.weight", "second.bias"):
        delta = difference(model.pretrained[name], model.finetuned[name])
        assert torch.equal(fused[name].mask, top_fraction(delta.abs(), 0.2, seed=Rng(0).seed(name)))
        assert fused[name].tensor is model.finetuned[name] and not fused[name].facts


def test_tailor_reports_errors_on_both_grams(make_model):
    model = make_model(torch.bfloat16)
    plain = run(Tailor(0.2, decorator="exact"), model)["first.weight"].facts
    assert plain["token_count"] == 50
    assert plain["errors"].keys() == {"calibration", "held_out"}
    assert plain["errors"]["calibration"].keys() == {"none", "exact", "rounded"}
    compared = run(Tailor(0.2, decorator="exact", compare_decorators=True), model)["first.weight"].facts["errors"]
    errors = compared["calibration"]
    assert errors.keys() == {"none", "sparsegpt", "exact", "rounded"}
    assert errors["exact"] <= min(errors["none"], errors["sparsegpt"], errors["rounded"])
    assert errors["rounded"] == pytest.approx(errors["exact"], rel=0.05)
    assert errors["exact"] == plain["errors"]["calibration"]["exact"]


def test_error_after_rounding_is_that_of_the_written_weights(make_model):
    model = make_model(torch.bfloat16)
    method = Tailor(0.2, decorator="exact")
    patch, report = fuse_to_patch(model.pretrained, model.finetuned, method, evidence=model.evidence)
    written = dict(patch.apply_to(model.pretrained))["first.weight"]
    base, tuned = model.pretrained["first.weight"].float(), model.finetuned["first.weight"].float()
    gram = damp(model.evidence.calibration["first.weight"], 0.01)
    row = next(row for row in report.tensors if row.name == "first.weight")
    expected = layer_error(tuned - base, written.float() - base, gram)
    assert row.facts["errors"]["calibration"]["rounded"] == pytest.approx(expected, rel=1e-6)


def test_a_mask_leaves_untouched_entries_to_the_last():
    base = torch.zeros(4, 10)
    tuned = base.clone()
    tuned[:, ::3] = 1e-25  # so small that its square, and with it the sensitivity, is 0 in float32
    accumulator = GramAccumulator()
    accumulator.add(torch.randn(40, 10, generator=torch.Generator().manual_seed(0)))
    evidence = GramEvidence(Grams.collect({"w": "w"}, {"w": accumulator}))
    for omega in (0.0, 0.5, 1.0):
        (fused,) = Tailor(0.4, omega=omega).fuse({"w": base}, {"w": tuned}, evidence, Rng())
        assert torch.equal(fused.mask, tuned != base)


def test_a_layer_that_did_not_change_has_no_error(make_model):
    model = make_model()
    same = dataclasses.replace(model, finetuned=model.pretrained)
    for fused in run(Tailor(0.3, decorator="exact"), same).values():
        assert torch.equal(fused.tensor, model.pretrained[fused.name])
        assert fused.facts.get("errors", {"calibration": {"rounded": 0.0}})["calibration"]["rounded"] == 0.0


def test_grams_that_do_not_fit(make_model):
    model = make_model()
    grams = model.evidence.calibration
    for names, matrices, message in (
        ({"elsewhere.weight": "first"}, grams.matrices, "none of the 6 tensors in scope has a Gram"),
        ({"first.weight": "second"}, grams.matrices, r"first\.weight: a Gram of shape \(10, 10\) does not fit"),
        ({"first.bias": "first"}, grams.matrices, r"first\.bias: a Gram of shape \(6, 6\) does not fit"),
    ):
        wrong = GramEvidence(Grams(names, matrices, grams.token_counts))
        with pytest.raises(TailorError, match=message):
            run(Tailor(0.1), dataclasses.replace(model, evidence=wrong))


def test_too_few_tokens_need_damping(make_model):
    model = make_model()
    accumulator = GramAccumulator()
    accumulator.add(torch.randn(4, 6))
    few = GramEvidence(Grams.collect({"first.weight": "first"}, {"first": accumulator}))
    model = dataclasses.replace(model, evidence=few)
    with pytest.raises(SingularGram, match=r"first\.weight: 4 tokens cannot tell 6 inputs apart"):
        run(Tailor(0.1, damping=0.0), model)
    run(Tailor(0.1, damping=0.01), model)


@pytest.mark.parametrize(
    "method", [Tailor(0.5, omega=1.0, decorator="exact", damping=0.0), ReleasedCode(0.5, reset=(), keep_finetuned=())]
)
def test_a_singular_gram_is_told_with_its_tokens_and_the_remedy(make_model, method):
    model = make_model()
    accumulator = GramAccumulator()
    accumulator.add(torch.randn(7, 1).expand(7, 6))  # six inputs that are always equal
    method = dataclasses.replace(method, damping=0.0)
    singular = GramEvidence(Grams.collect({"first.weight": "first"}, {"first": accumulator}))
    remedy = r"raise the damping or calibrate with more samples \(this Gram is of 7 tokens\)"
    with pytest.raises(SingularGram, match=rf"^first\.weight: the Gram .*not positive definite.*{remedy}$") as raised:
        run(method, dataclasses.replace(model, evidence=singular))
    assert raised.value.token_count == 7


def test_tailor_solves_in_float64_on_request(make_model):
    model = make_model()
    single, double = (run(Tailor(0.4, decorator="exact", precision=p), model) for p in ("float32", "float64"))
    for name in ("first.weight", "second.weight"):
        assert double[name].facts["residual"] < 1e-12 < single[name].facts["residual"] < 1e-5
        torch.testing.assert_close(single[name].tensor, double[name].tensor, rtol=1e-4, atol=1e-5)
        assert double[name].tensor.dtype == torch.float32
    with pytest.raises(InvalidSetting, match=r"Tailor\.precision = 'float16' is none of float32, float64"):
        Tailor(0.1, precision="float16")


class TestGrafting:
    def test_no_step_is_global_magnitude(self, make_model):
        model = make_model()
        grafted, plain = run(Grafting(0.3, steps=0), model), run(Magnitude(0.3, "global"), model)
        for name, fused in grafted.items():
            assert torch.equal(fused.mask, plain[name].mask) and fused.facts == {"flipped_count": 0}

    def test_learns_which_changes_help(self):
        base = {"w": torch.zeros(6)}
        tuned = {"w": torch.tensor([3.0, 2.5, 2.0, 1.0, 0.5, 0.1])}
        goal = {"w": torch.tensor([0.0, 2.5, 2.0, 1.0, 0.5, 0.0])}  # the largest change harms, two smaller ones help
        (fused,) = Grafting(0.5, steps=30, learning_rate=1e5).fuse(base, tuned, QuadraticTask(goal), Rng())
        assert fused.mask.tolist() == [False, True, True, True, True, False]
        assert fused.facts["flipped_count"] == 3

    def test_first_step_by_hand(self):
        base, tuned = {"w": torch.zeros(2)}, {"w": torch.tensor([2.0, 1.0])}
        seen = []

        class Recorder(QuadraticTask):
            def gradient(self, weights):
                seen.append(weights["w"].clone())
                return super().gradient(weights)

        task = Recorder({"w": torch.zeros(2)})
        list(Grafting(0.5, steps=2, learning_rate=1.0, bias=0.0).fuse(base, tuned, task, Rng(3)))
        logits = torch.rand(2, generator=Rng(3).generator("w"))
        soft = torch.stack([1 - logits[0].sigmoid(), logits[1].sigmoid()])
        assert torch.allclose(seen[0], soft * tuned["w"])
        slope = torch.tensor([-1.0, 1.0]) * logits.sigmoid() * (1 - logits.sigmoid())
        logits = logits - seen[0] * tuned["w"] * slope
        soft = torch.stack([1 - logits[0].sigmoid(), logits[1].sigmoid()])
        assert torch.allclose(seen[1], soft * tuned["w"])

    def test_a_mask_seen_before_is_not_scored_again(self):
        base, tuned = {"w": torch.zeros(4)}, {"w": torch.arange(4.0)}
        task = QuadraticTask(tuned)
        list(Grafting(0.5, steps=5, learning_rate=0.0).fuse(base, tuned, task, Rng()))
        assert task.scored == 1

    @pytest.mark.parametrize("broken", ["gradient", "score"])
    def test_what_is_not_finite_is_an_error(self, broken):
        class Broken(QuadraticTask):
            def gradient(self, weights):
                found = super().gradient(weights)
                return {name: each * float("nan") for name, each in found.items()} if broken == "gradient" else found

            def score(self, weights):
                return float("nan") if broken == "score" else super().score(weights)

        base, tuned = {"w": torch.zeros(4)}, {"w": torch.arange(4.0)}
        with pytest.raises(NotFinite, match=broken):
            list(Grafting(0.5, steps=2).fuse(base, tuned, Broken(tuned), Rng()))


class TestReleasedCode:
    def test_against_a_loop_over_entries(self, make_layer):
        layer = make_layer(0, outputs=5, inputs=150, tokens=300)
        base = torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
        tuned = base + layer.delta
        accumulator = GramAccumulator()
        accumulator.add(layer.inputs)
        evidence = GramEvidence(Grams.collect({"w": "w"}, {"w": accumulator}))
        (fused,) = ReleasedCode(0.2, reset=(), keep_finetuned=()).fuse({"w": base}, {"w": tuned}, evidence, Rng())

        upper = torch.linalg.cholesky(layer.gram.double().inverse()).mT
        weight, start = tuned.double().clone(), base.double()
        mask = torch.zeros(5, 150, dtype=torch.bool)
        for first, end in ((0, 128), (128, 150)):
            loss = weight[:, first:end] ** 2 / upper.diagonal()[first:end] ** 2
            change = (tuned.double() - start)[:, first:end].abs()
            score = 0.8 * (change - change.mean(1, keepdim=True)) / change.std(1, keepdim=True)
            score += 0.2 * (loss - loss.mean(1, keepdim=True)) / loss.std(1, keepdim=True)
            kept = score.flatten().argsort(descending=True)[: round(0.2 * score.numel())]
            block = torch.zeros(score.numel(), dtype=torch.bool)
            block[kept] = True
            mask[:, first:end] = block.view(score.shape)
            for column in range(first, end):
                for row in range(5):
                    if not mask[row, column]:
                        error = (weight[row, column] - start[row, column]) / upper[column, column]
                        weight[row, column + 1 :] += error * upper[column, column + 1 :]
        assert torch.equal(fused.mask, mask)
        torch.testing.assert_close(fused.tensor[mask].double(), weight[mask], rtol=1e-3, atol=1e-4)

    def test_other_tensors_stay_finetuned_and_the_projector_goes_back(self, make_model):
        fused = run(ReleasedCode(0.2, reset=["embed.*"], keep_finetuned=[]), make_model())
        assert not fused["embed.weight"].mask.any()
        assert fused["first.bias"].mask is None and fused["norm.weight"].mask is None
        with pytest.raises(ScopeError, match="projector"):
            run(ReleasedCode(0.2), make_model())

    def test_a_head_stays_finetuned_though_it_has_a_gram(self, make_model):
        fused = run(ReleasedCode(0.2, reset=[], keep_finetuned=["first.weight"]), make_model())
        assert fused["first.weight"].mask is None

    def test_inputs_that_never_fired(self, make_model):
        model = make_model()
        accumulator = GramAccumulator()
        accumulator.add(torch.randn(30, 6) * torch.tensor([1.0, 0, 1, 1, 0, 1]))
        dead = GramEvidence(Grams.collect({"first.weight": "first"}, {"first": accumulator}))
        run(ReleasedCode(0.5, reset=(), keep_finetuned=()), dataclasses.replace(model, evidence=dead))


def test_rng_depends_on_seed_and_name_alone():
    rng = Rng(7)
    assert rng.seed("a") == Rng(7).seed("a") != rng.seed("b") != Rng(8).seed("b")
    assert 0 <= rng.seed("a") < 2**63
    first = torch.rand(3, generator=rng.generator("a"))
    torch.rand(3, generator=rng.generator("b"))
    assert torch.equal(first, torch.rand(3, generator=rng.generator("a")))
