"""Stitching against float64 brute force, by hand, and in what all three ways have in common."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tailor.decorate import decorate
from tailor.errors import CheckpointMismatch, InvalidSetting, NotFinite, PatchError, ScopeError, TailorError
from tailor.fuse import fuse_to_patch
from tailor.gram import GramAccumulator, Grams
from tailor.method import GramEvidence
from tailor.methods.stitched import Stitched
from tailor.methods.tailor import Tailor
from tailor.patch import Patch
from tailor.stitch import STITCHINGS, stitch, stitch_patches

LAYERS = ("first.weight", "second.weight")
OTHERS = ("embed.weight", "first.bias", "norm.weight", "second.bias")


@dataclass
class Tasks:
    base: dict[str, Tensor]
    tuned: list[dict[str, Tensor]]
    evidence: list[GramEvidence]

    def stitch(self, method: Tailor, how: str, **options):
        patch, report = stitch(self.base, self.tuned, method, how, evidence=self.evidence, **options)
        return {**self.base, **dict(patch.apply_to(self.base))}, report, patch

    def alone(self, number: int, method: Tailor, seed: int = 0):
        return fuse_to_patch(self.base, self.tuned[number], method, evidence=self.evidence[number], seed=seed)

    def reordered(self, order) -> Tasks:
        return Tasks(self.base, [self.tuned[k] for k in order], [self.evidence[k] for k in order])


@pytest.fixture
def make_tasks(make_model):
    """So many fine-tunings of one toy model, each with inputs of its own."""

    def make(count: int, dtype: torch.dtype = torch.float32) -> Tasks:
        base = make_model(dtype).pretrained
        tuned, evidence = [], []
        for seed in range(1, count + 1):
            other = make_model(torch.float32, seed=seed)
            moved = {}
            for name, weight in base.items():
                change = other.finetuned[name].float() - other.pretrained[name].float()
                moved[name] = (weight.float() + change).to(weight.dtype)
            tuned.append(moved)
            evidence.append(other.evidence)
        return Tasks(base, tuned, evidence)

    return make


def parts_of(tasks: Tasks, name: str, method: Tailor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(delta, mask, own compensation, damped Gram) of each task in float64, from each task's fusion alone."""
    parts = []
    for number, (tuned, evidence) in enumerate(zip(tasks.tuned, tasks.evidence, strict=True)):
        patch, _ = tasks.alone(number, dataclasses.replace(method, decorator="none"))
        mask = torch.zeros(tuned[name].numel(), dtype=torch.bool)
        if name in patch.tensors:
            mask[patch.tensors[name].indices()] = True
        mask = mask.view(tuned[name].shape)
        delta = tuned[name].double() - tasks.base[name].double()
        if name in evidence.calibration:
            gram = evidence.calibration[name].double()
            gram += method.damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
            compensation = decorate(delta, mask, gram, method.decorator) - delta * mask
        else:
            gram, compensation = torch.zeros(0), torch.zeros_like(delta)
        parts.append((delta, mask, compensation, gram))
    return parts


def brute_force(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], how: str) -> Tensor:
    """The stitched delta, entry by entry, and for `joint` row by row."""
    shape = parts[0][0].shape
    result = torch.zeros(shape, dtype=torch.float64)
    if how == "joint":
        union = torch.stack([mask for _, mask, _, _ in parts]).any(0)
        roots = [torch.linalg.cholesky(gram) for *_, gram in parts]
        for row in range(shape[0]):
            on = union[row]
            if on.any():
                system = torch.cat([root[on].T for root in roots])
                wanted = torch.cat([delta[row] @ root for (delta, *_), root in zip(parts, roots, strict=True)])
                result[row, on] = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
        return result
    for place in itertools.product(*map(range, shape)):
        chosen = [(delta[place], own[place]) for delta, mask, own, _ in parts if mask[place]]
        if chosen:
            deltas = sum(delta for delta, _ in chosen) / len(chosen)
            owns = sum(own for _, own in chosen) / (len(parts) if how == "paper" else len(chosen))
            result[place] = deltas + owns
    return result


@pytest.mark.parametrize("how", STITCHINGS)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("sparsity", [0.1, 0.4])
def test_against_brute_force(make_tasks, how, count, sparsity):
    tasks, method = make_tasks(count), Tailor(sparsity, decorator="exact")
    stitched, _, _ = tasks.stitch(method, how)
    for name in LAYERS + OTHERS:
        expected = brute_force(parts_of(tasks, name, method), how if name in LAYERS else "mean")
        found = stitched[name].double() - tasks.base[name].double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=3e-6)
    assert torch.equal(stitched["frozen.weight"], tasks.base["frozen.weight"])


@pytest.mark.parametrize("how", ["paper", "mean"])
@pytest.mark.parametrize("decorator", ["none", "sparsegpt"])
def test_other_decorators_against_brute_force(make_tasks, how, decorator):
    tasks, method = make_tasks(2), Tailor(0.3, decorator=decorator)
    stitched, _, _ = tasks.stitch(method, how)
    for name in LAYERS:
        found = stitched[name].double() - tasks.base[name].double()
        torch.testing.assert_close(found, brute_force(parts_of(tasks, name, method), how), rtol=1e-3, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("how", "decorator"), [(how, "exact") for how in STITCHINGS] + [("paper", "sparsegpt"), ("mean", "none")]
)
def test_one_task_is_its_own_fusion_bit_for_bit(make_tasks, dtype, sparsity, how, decorator):
    tasks, method = make_tasks(1, dtype), Tailor(sparsity, decorator=decorator)
    stitched, report, _ = tasks.stitch(method, how, seed=3)
    patch, own = tasks.alone(0, method, seed=3)
    fused = {**tasks.base, **dict(patch.apply_to(tasks.base))}
    assert all(torch.equal(stitched[name], fused[name]) for name in fused)
    own_rows = {row.name: row for row in own.tensors}
    for row in report.tensors:
        same = own_rows[row.name]
        assert (row.fate, row.mask_count, row.changed_count) == (same.fate, same.mask_count, same.changed_count)
        if "errors" in same.facts:
            assert row.facts["token_count"] == same.facts["token_count"]
            for tokens, errors in same.facts["errors"].items():
                stitched_errors = row.facts["errors"][tokens]
                assert stitched_errors["stitched"] == pytest.approx(errors[decorator], rel=1e-4, abs=1e-9)
                assert stitched_errors["rounded"] == pytest.approx(errors["rounded"], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("how", STITCHINGS)
def test_several_times_the_same_task_is_that_task(make_tasks, how):
    tasks, method = make_tasks(1), Tailor(0.3, decorator="exact")
    one, _, _ = tasks.stitch(method, how)
    three, _, _ = tasks.reordered([0, 0, 0]).stitch(method, how)
    for name in one:
        torch.testing.assert_close(one[name], three[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", STITCHINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_tasks_does_not_matter(tmp_path, make_tasks, how, dtype):
    tasks, method = make_tasks(3, dtype), Tailor(0.4, decorator="exact")
    contents = set()
    for order in itertools.permutations(range(3)):
        _, report, patch = tasks.reordered(order).stitch(method, how)
        patch.save(tmp_path / "patch")
        contents.add((tmp_path / "patch").read_bytes())
        contents.add(repr([row.facts.get("errors") for row in report.tensors]).encode())
    assert len(contents) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joint_loses_least(make_tasks, dtype):
    for count, sparsity in itertools.product((2, 4), (0.05, 0.3)):
        tasks = make_tasks(count, dtype)
        reports = {how: tasks.stitch(Tailor(sparsity, decorator="exact"), how)[1] for how in STITCHINGS}
        for name in LAYERS:
            errors = {
                how: next(row for row in report.tensors if row.name == name).facts["errors"]["calibration"]
                for how, report in reports.items()
            }
            least = errors["joint"]["stitched"]
            assert 0 < least < min(errors["paper"]["stitched"], errors["mean"]["stitched"], 1)
            parts = parts_of(tasks, name, Tailor(sparsity, decorator="exact"))
            best = brute_force(parts, "joint")
            lost = sum(float((((d - best) @ gram) * (d - best)).sum()) for d, _, _, gram in parts)
            whole = sum(float(((d @ gram) * d).sum()) for d, _, _, gram in parts)
            assert least == pytest.approx(lost / whole, rel=1e-3)


def test_joint_at_a_full_mask_is_regression_mean(make_tasks):
    """Jin et al., arXiv 2212.09849: (Σ W_k H_k) (Σ H_k)⁻¹."""
    tasks = make_tasks(3)
    stitched, _, _ = tasks.stitch(Tailor(1.0, decorator="exact", damping=1e-3), "joint")
    for name in LAYERS:
        grams = []
        for evidence in tasks.evidence:
            gram = evidence.calibration[name].double()
            grams.append(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64))
        weighted = sum(tuned[name].double() @ gram for tuned, gram in zip(tasks.tuned, grams, strict=True))
        torch.testing.assert_close(stitched[name].double(), weighted @ sum(grams).inverse(), rtol=1e-3, atol=1e-4)


def test_two_inputs_by_hand():
    """Uncorrelated inputs, so no task compensates; the first entry is chosen by both, the others by one each."""
    base = {"w": torch.zeros(1, 4)}
    tuned = [{"w": torch.tensor([[9.0, 4.0, 0.0, 1.0]])}, {"w": torch.tensor([[3.0, 0.0, 4.0, -1.0]])}]
    evidence = []
    for scale in (1.0, 2.0):
        accumulator = GramAccumulator()
        accumulator.add(scale * torch.eye(4))
        evidence.append(GramEvidence(Grams.collect({"w": "w"}, {"w": accumulator})))
    method = Tailor(0.5, omega=1.0, decorator="exact", damping=0.0)
    expected = {
        "paper": [6.0, 4.0, 4.0, 0.0],
        "mean": [6.0, 4.0, 4.0, 0.0],
        "joint": [(9 + 4 * 3) / 5, 4 / 5, 4 * 4 / 5, 0.0],  # the second task's inputs have four times the energy
    }
    for how, values in expected.items():
        patch, report = stitch(base, tuned, method, how, evidence=evidence)
        assert torch.allclose(dict(patch.apply_to(base))["w"], torch.tensor([values]))
        (row,) = report.tensors
        assert row.mask_count == row.changed_count == 3 and row.facts["overlap_count"] == 1
        assert [task["mask_count"] for task in row.facts["tasks"]] == [2, 2]


def test_a_task_that_left_a_layer_alone(make_tasks):
    """It chooses nothing there; `joint` holds its outputs, `mean` takes the other task's, `paper` divides by two."""
    tasks, method = make_tasks(2), Tailor(0.3, decorator="exact")
    name = "first.weight"
    tasks.tuned[1][name] = tasks.base[name]
    (delta, mask, own, gram), (*_, held) = parts_of(make_tasks(2), name, method)
    moved = {how: tasks.stitch(method, how)[0][name].double() - tasks.base[name].double() for how in STITCHINGS}
    close = {"rtol": 1e-3, "atol": 3e-6}
    torch.testing.assert_close(moved["mean"], delta * mask + own, **close)
    torch.testing.assert_close(moved["paper"], delta * mask + own / 2, **close)
    nothing = torch.zeros_like(delta)
    silent = [(delta, mask, own, gram), (nothing, mask & False, nothing, held)]
    torch.testing.assert_close(moved["joint"], brute_force(silent, "joint"), **close)
    _, report, _ = tasks.stitch(method, "joint")
    first, second = next(row for row in report.tensors if row.name == name).facts["tasks"]
    assert first["error"] > 0 and second == {"mask_count": 0, "error": None}

    without = {layer: key for layer, key in tasks.evidence[1].calibration.keys_of_layers.items() if layer != name}
    grams = dataclasses.replace(tasks.evidence[1].calibration, keys_of_layers=without)
    tasks.evidence[1] = GramEvidence(grams)
    alone, _ = tasks.alone(0, method)
    fused = dict(alone.apply_to(tasks.base))[name]
    assert torch.equal(tasks.stitch(method, "joint")[0][name], fused)


def test_a_task_without_a_gram_that_others_have(make_tasks):
    tasks, method = make_tasks(2), Tailor(0.3, decorator="exact")
    grams = tasks.evidence[1].calibration
    tasks.evidence[1] = GramEvidence(dataclasses.replace(grams, keys_of_layers={"second.weight": "second"}))
    for how in ("paper", "mean"):
        tasks.stitch(method, how)
    with pytest.raises(TailorError, match=r"first\.weight: fine-tuned model 2 changed it, but has no Gram"):
        tasks.stitch(method, "joint")


def test_fine_tunings_of_several_dtypes(make_tasks):
    tasks, method = make_tasks(2), Tailor(0.5, decorator="none")
    tasks.tuned[1] = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tasks.tuned[1].items()}
    stitched, _, _ = tasks.stitch(method, "mean")
    patches = [tasks.alone(number, method)[0] for number in range(2)]
    for name, tensor in stitch_patches(tasks.base, patches).apply_to(tasks.base):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(stitched[name], tensor, rtol=1e-6, atol=1e-7)


def test_from_folders_as_from_memory(tmp_path, make_tasks, write_checkpoint):
    tasks, method = make_tasks(2, torch.bfloat16), Tailor(0.3, decorator="exact")
    base = write_checkpoint(tmp_path / "base", tasks.base, shards=2)
    tuned = [write_checkpoint(tmp_path / f"task{k}", weights, shards=k + 1) for k, weights in enumerate(tasks.tuned)]
    done = []
    patch, report = stitch(base, tuned, method, "joint", evidence=tasks.evidence, progress=done.append)
    stitched, same, _ = tasks.stitch(method, "joint")
    assert all(torch.equal(tensor, stitched[name]) for name, tensor in patch.apply_to(tasks.base))
    assert report.to_json() == same.to_json() and sorted(done) == sorted(LAYERS + OTHERS)
    assert patch.header["base"] == "base" and patch.header["tasks"] == ["task0", "task1"]
    assert patch.header["settings"]["how"] == "joint" and patch.header["settings"]["sparsity"] == 0.3


def test_scope(make_tasks):
    tasks = make_tasks(2)
    _, report, patch = tasks.stitch(Tailor(0.3), "paper", scope=["second.*"])
    assert set(patch.tensors) == {"second.weight", "second.bias"}
    assert {row.name for row in report.tensors if row.fate == "fused"} == set(patch.tensors)
    with pytest.raises(ScopeError, match="matches no tensor"):
        tasks.stitch(Tailor(0.3), "paper", scope=["third.*"])


def test_what_cannot_be_stitched(make_tasks):
    tasks = make_tasks(2)
    with pytest.raises(InvalidSetting, match="'sum' is unknown; choose one of paper, mean, joint"):
        tasks.stitch(Tailor(0.1), "sum")
    with pytest.raises(InvalidSetting, match=r"decorator 'sparsegpt' would not be used; set it to 'exact'"):
        tasks.stitch(Tailor(0.1), "joint")
    with pytest.raises(InvalidSetting, match="2 fine-tuned models with 1 sets of Grams"):
        Tasks(tasks.base, tasks.tuned, tasks.evidence[:1]).stitch(Tailor(0.1), "mean")
    with pytest.raises(InvalidSetting, match="0 fine-tuned models"):
        Tasks(tasks.base, [], []).stitch(Tailor(0.1), "mean")
    seen = dataclasses.replace(tasks.evidence[1], retain=tasks.evidence[1].calibration)
    with pytest.raises(TailorError, match="Tailor uses no samples of old tasks"):
        Tasks(tasks.base, tasks.tuned, [tasks.evidence[0], seen]).stitch(Tailor(0.1), "mean")
    elsewhere = GramEvidence(dataclasses.replace(tasks.evidence[1].calibration, keys_of_layers={"x": "first"}))
    with pytest.raises(TailorError, match="none of the 6 tensors in scope has a Gram"):
        Tasks(tasks.base, tasks.tuned, [tasks.evidence[0], elsewhere]).stitch(Tailor(0.1), "mean")
    smaller = {**tasks.tuned[1], "norm.weight": torch.ones(2)}
    with pytest.raises(CheckpointMismatch, match=r"fine-tuned \(2,\)"):
        Tasks(tasks.base, [tasks.tuned[0], smaller], tasks.evidence).stitch(Tailor(0.1), "mean")
    tasks.tuned[1]["second.weight"][0, 0] = torch.nan
    with pytest.raises(NotFinite, match=r"second\.weight: fine-tuned model 2 holds 1 NaN"):
        tasks.stitch(Tailor(0.1), "mean")


@pytest.mark.parametrize("how", STITCHINGS)
def test_as_a_baseline_the_tasks_share_the_sparsity(make_tasks, how):
    tasks = make_tasks(2)
    patch, report = Stitched(how, 0.4, decorator="exact").stitch(
        tasks.base, tasks.tuned, evidence=tasks.evidence, seed=3
    )
    _, same, expected = tasks.stitch(Tailor(0.2, decorator="exact"), how, seed=3)
    assert report.to_json() == same.to_json() and not report.to_json()["sees_old_tasks"]
    assert patch.header == expected.header and patch.header["settings"]["sparsity"] == 0.2
    for name, tensor in patch.apply_to(tasks.base):
        assert torch.equal(tensor, dict(expected.apply_to(tasks.base))[name])


def test_inputs_are_not_modified(make_tasks):
    tasks = make_tasks(2)
    before = [{name: tensor.clone() for name, tensor in weights.items()} for weights in (tasks.base, *tasks.tuned)]
    grams = [evidence.calibration["first.weight"].clone() for evidence in tasks.evidence]
    for how in STITCHINGS:
        tasks.stitch(Tailor(0.3, decorator="exact"), how)
    for weights, copies in zip((tasks.base, *tasks.tuned), before, strict=True):
        assert all(torch.equal(weights[name], copies[name]) for name in copies)
    for evidence, gram in zip(tasks.evidence, grams, strict=True):
        assert torch.equal(evidence.calibration["first.weight"], gram)


class TestPatches:
    def test_is_the_mean_of_the_fusions(self, make_tasks):
        tasks, method = make_tasks(3), Tailor(0.3, decorator="exact")
        patches = [tasks.alone(number, method)[0] for number in range(3)]
        stitched, _, _ = tasks.stitch(method, "mean")
        for name, tensor in stitch_patches(tasks.base, patches).apply_to(tasks.base):
            torch.testing.assert_close(tensor, stitched[name], rtol=1e-6, atol=1e-7)

    def test_by_hand(self):
        base = {"a": torch.tensor([1.0, 1.0, 1.0, 1.0]), "b": torch.tensor([5.0])}
        one = Patch.between(base, {"a": torch.tensor([2.0, 4.0, 1.0, 1.0])}, {"base": "toy", "method": "one"})
        two = Patch.between(base, {"a": torch.tensor([6.0, 1.0, 3.0, 1.0]), "b": torch.tensor([-0.0])}, {"base": "toy"})
        stitched = stitch_patches(base, [one, two])
        fused = dict(stitched.apply_to(base))
        assert torch.equal(fused["a"], torch.tensor([4.0, 4.0, 3.0, 1.0]))
        assert fused["b"].item() == 0 and torch.signbit(fused["b"]).item()
        assert stitched.header["base"] == "toy" and {"base": "toy", "method": "one"} in stitched.header["patches"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_disjoint_patches_stack(self, dtype):
        generator = torch.Generator().manual_seed(0)
        base = {"w": torch.randn(20, 30, generator=generator).to(dtype)}
        owner = torch.randint(0, 4, (20, 30), generator=generator)  # the last quarter belongs to nobody
        patches = []
        for task in range(3):
            other = torch.randn(20, 30, generator=generator).to(dtype)
            patches.append(Patch.between(base, {"w": torch.where(owner == task, other, base["w"])}))
        weights = base
        for patch in patches:
            weights = dict(patch.apply_to(weights))
        fused = dict(stitch_patches(base, patches).apply_to(base))
        assert torch.equal(fused["w"], weights["w"]) and torch.equal(fused["w"][owner == 3], base["w"][owner == 3])

    def test_order_does_not_matter_and_one_alone_stays(self, tmp_path, make_tasks):
        tasks = make_tasks(3, torch.bfloat16)
        patches = [tasks.alone(number, Tailor(0.4))[0] for number in range(3)]
        for number, order in enumerate(itertools.permutations(patches)):
            stitch_patches(tasks.base, order).save(tmp_path / str(number))
        assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
        alone = dict(stitch_patches(tasks.base, patches[:1]).apply_to(tasks.base))
        assert all(torch.equal(alone[name], tensor) for name, tensor in patches[0].apply_to(tasks.base))

    def test_what_cannot_be_stitched(self):
        base = {"w": torch.zeros(3), "ids": torch.arange(3)}
        with pytest.raises(InvalidSetting, match="there are no patches"):
            stitch_patches(base, [])
        patch = Patch.between(base, {"w": torch.ones(3)}, {"base": "toy"})
        with pytest.raises(PatchError, match=r"w: the weights differ from the patch's base \(toy\)"):
            stitch_patches({**base, "w": torch.full((3,), 2.0)}, [patch])
        with pytest.raises(PatchError, match=r"ids: torch\.int64 entries have no mean"):
            stitch_patches(base, [Patch.between(base, {"ids": torch.zeros(3).long()})])
