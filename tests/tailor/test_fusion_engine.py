"""Folders in, folder out: what the engine holds every method to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tailor.checkpoint import Checkpoint
from tailor.errors import CheckpointError, CheckpointMismatch, NotFinite, ScopeError, SingularGram, TailorError
from tailor.fuse import fuse, fuse_to_patch, fused_tensors
from tailor.gram import GramAccumulator, Grams
from tailor.method import Fused, GramEvidence
from tailor.methods.dare import Dare
from tailor.methods.finetune import FineTune
from tailor.methods.magnitude import Magnitude
from tailor.methods.tailor import Tailor
from tailor.methods.wise_ft import WiseFT
from tailor.methods.zero_shot import ZeroShot


@pytest.fixture
def folders(tmp_path, make_model, write_checkpoint):
    model = make_model(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", model.pretrained, shards=2)
    tuned = write_checkpoint(tmp_path / "tuned", model.finetuned, shards=3)
    return base, tuned, model


def test_folder_equals_patch(tmp_path, folders):
    base, tuned, model = folders
    method = Tailor(0.3, decorator="exact")
    report = fuse(base, tuned, method, tmp_path / "out", evidence=model.evidence, seed=5)
    patch, same = fuse_to_patch(base, tuned, method, evidence=model.evidence, seed=5)
    assert report.to_json() == same.to_json()
    fused = Checkpoint(tmp_path / "out")
    assert fused.names == Checkpoint(base).names
    patched = {**Checkpoint(base), **dict(patch.apply_to(Checkpoint(base)))}
    assert all(torch.equal(fused[name], patched[name]) for name in fused)
    assert all(fused.dtype(name) == Checkpoint(base).dtype(name) for name in fused)
    restored = {**fused, **dict(patch.remove_from(fused))}
    assert all(torch.equal(restored[name], model.pretrained[name]) for name in fused)
    assert patch.header["base"] == "base" and patch.header["method"] == "Tailor" and patch.header["seed"] == 5
    assert patch.header["settings"]["sparsity"] == 0.3 and patch.header["settings"]["decorator"] == "exact"


def test_other_files_come_from_the_finetuned_folder(tmp_path, folders):
    base, tuned, _ = folders
    fuse(base, tuned, WiseFT(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"made_for": "tuned"}
    assert (tmp_path / "out" / "processor" / "vocabulary.txt").read_bytes() == b"a\r\nb\x00\xff"


def test_report_accounts_for_every_tensor(folders):
    base, tuned, model = folders
    done = []
    scope = ["first.*", "frozen.*"]
    _, report = fuse_to_patch(base, tuned, Magnitude(0.5), scope=scope, progress=done.append)
    rows = {row["name"]: row for row in report.to_json()["tensors"]}
    assert {name: row["fate"] for name, row in rows.items()} == {
        "embed.weight": "copied",
        "first.bias": "fused",
        "first.weight": "fused",
        "frozen.weight": "kept",
        "norm.weight": "copied",
        "position_ids": "copied",
        "second.bias": "copied",
        "second.weight": "copied",
    }
    assert done == ["first.bias", "first.weight"]
    assert rows["first.weight"] == {
        "name": "first.weight",
        "shape": [10, 6],
        "fate": "fused",
        "numel": 60,
        "mask_count": 30,
        "changed_count": 30,
        "token_count": None,
        "errors": None,
        "residual": None,
    }
    totals = report.totals
    assert totals["parameter_count"] == sum(tensor.numel() for tensor in model.pretrained.values())
    assert totals["scope_count"] == 86 and totals["mask_count"] == totals["changed_count"] == 35
    assert totals["mask_fraction"] == 35 / 86
    assert totals["tensor_counts"] == {"fused": 2, "kept": 1, "copied": 5, "tied": 0}


def test_report_is_plain_json_and_compares_decorators(folders):
    base, tuned, model = folders
    method = Tailor(0.3, compare_decorators=True)
    _, report = fuse_to_patch(base, tuned, method, evidence=model.evidence)
    plain = json.loads(json.dumps(report.to_json()))
    assert plain == report.to_json()
    assert plain["method"] == "Tailor" and plain["settings"]["omega"] == 0.5
    order = plain["decorator_order"]["calibration"]
    assert order["layer_count"] == order["exact<=none"] == order["exact<=sparsegpt"] == 2
    assert plain["totals"]["gram_tensor_count"] == 2
    residuals = [row["residual"] for row in plain["tensors"] if row["residual"] is not None]
    assert len(residuals) == 2 and plain["totals"]["largest_residual"] == max(residuals) < 1e-5
    _, silent = fuse_to_patch(base, tuned, Tailor(0.3), evidence=model.evidence)
    assert silent.decorator_order() is None and silent.totals["largest_residual"] is None


def test_the_base_is_cast_before_deltas_and_keeps_its_dtype(make_model):
    model = make_model(torch.float32, torch.bfloat16)
    model.finetuned["norm.weight"] = model.pretrained["norm.weight"].bfloat16()
    patch, report = fuse_to_patch(model.pretrained, model.finetuned, Magnitude(0.5))
    assert {row.name: row.fate for row in report.tensors}["norm.weight"] == "copied"
    for name, tensor in patch.apply_to(model.pretrained):
        assert tensor.dtype == torch.float32
        moved = tensor != model.pretrained[name]
        assert torch.equal(tensor[moved], model.finetuned[name].float()[moved])


def test_seed_decides_and_order_does_not(folders):
    base, tuned, model = folders
    one, _ = fuse_to_patch(base, tuned, Dare(0.5), seed=1)
    two, _ = fuse_to_patch(base, tuned, Dare(0.5), seed=2)
    shuffled = dict(reversed(list(model.pretrained.items())))
    again, _ = fuse_to_patch(shuffled, model.finetuned, Dare(0.5), seed=1)
    scoped, _ = fuse_to_patch(base, tuned, Dare(0.5), scope=["second.weight"], seed=1)
    name = "second.weight"
    assert torch.equal(one.tensors[name].gaps, again.tensors[name].gaps)
    assert torch.equal(one.tensors[name].gaps, scoped.tensors[name].gaps)
    assert any(not torch.equal(one.tensors[n].gaps, two.tensors[n].gaps) for n in one.tensors if n in two.tensors)


def test_identical_checkpoints_give_the_base(tmp_path, folders):
    base, _, _ = folders
    report = fuse(base, base, FineTune(), tmp_path / "out")
    assert report.totals["scope_count"] == report.totals["changed_count"] == 0
    assert all(torch.equal(Checkpoint(tmp_path / "out")[name], Checkpoint(base)[name]) for name in Checkpoint(base))


@pytest.mark.parametrize(
    ("break_model", "error", "message"),
    [
        (
            lambda m: m.finetuned["norm.weight"].__setitem__(2, torch.nan),
            NotFinite,
            r"norm\.weight: the fine-tuned .* 1 ",
        ),
        (lambda m: m.pretrained["norm.weight"].__setitem__(0, torch.inf), NotFinite, r"norm\.weight: the pretrained"),
        (lambda m: m.finetuned.pop("norm.weight"), CheckpointMismatch, r"only in the pretrained: norm\.weight"),
        (lambda m: m.finetuned.update({"norm.weight": torch.ones(2)}), CheckpointMismatch, r"fine-tuned \(2,\)"),
        (lambda m: m.finetuned.update({"position_ids": torch.zeros(5).long()}), ScopeError, r"position_ids: changed"),
    ],
)
def test_a_failed_fusion_leaves_nothing(tmp_path, make_model, write_checkpoint, break_model, error, message):
    model = make_model()
    break_model(model)
    base = write_checkpoint(tmp_path / "base", model.pretrained)
    tuned = write_checkpoint(tmp_path / "tuned", model.finetuned)
    with pytest.raises(error, match=message):
        fuse(base, tuned, WiseFT(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_singular_gram_stops_the_fusion(tmp_path, folders):
    base, tuned, _ = folders
    accumulator = GramAccumulator()
    accumulator.add(torch.randn(3, 1) @ torch.randn(1, 6))
    accumulator.add(torch.zeros(10, 6))
    evidence = GramEvidence(Grams.collect({"first.weight": "first"}, {"first": accumulator}))
    with pytest.raises(SingularGram, match=r"first\.weight"):
        fuse(base, tuned, Tailor(0.3, damping=0.0), tmp_path / "out", evidence=evidence)
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused(tmp_path, folders):
    base, tuned, _ = folders
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        fuse(base, tuned, ZeroShot(), tmp_path / "out")


def test_a_result_that_overflows_its_dtype():
    base, tuned = {"w": torch.zeros(50).half()}, {"w": torch.full((50,), 6e4).half()}
    with pytest.raises(NotFinite, match=r"w: fused by Dare and rounded to torch\.float16"):
        fuse_to_patch(base, tuned, Dare(0.5))


@dataclass(frozen=True)
class Careless:
    """Breaks the contract in a chosen way."""

    how: str
    needs: ClassVar[str] = "nothing"

    def fuse(self, pretrained, finetuned, evidence, rng) -> Iterator[Fused]:
        for name, tensor in finetuned.items():
            if self.how == "leaves out":
                return
            if self.how == "wrong shape":
                yield Fused(name, tensor[None], None)
            elif self.how == "no bool":
                yield Fused(name, tensor, torch.ones_like(tensor))
            else:
                yield Fused(name, tensor, None)
                yield Fused(name, tensor, None)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("leaves out", "Careless left out embed.weight"),
        ("twice", "yielded embed.weight twice"),
        ("wrong shape", r"embed.weight: Careless yielded \(1, 7, 6\)"),
        ("no bool", "under a torch.float32 mask"),
    ],
)
def test_a_method_that_breaks_the_contract_is_caught(make_model, how, message):
    model = make_model()
    with pytest.raises(TailorError, match=message):
        list(fused_tensors(model.pretrained, model.finetuned, Careless(how)))


def test_what_a_method_writes_outside_its_mask_is_dropped(make_model):
    @dataclass(frozen=True)
    class Sloppy:
        needs: ClassVar[str] = "nothing"

        def fuse(self, pretrained, finetuned, evidence, rng) -> Iterator[Fused]:
            for name, tensor in finetuned.items():
                mask = torch.zeros_like(tensor, dtype=torch.bool)
                mask.view(-1)[0] = True
                yield Fused(name, tensor, mask)

    model = make_model()
    patch, report = fuse_to_patch(model.pretrained, model.finetuned, Sloppy())
    assert patch.changed_count == report.totals["mask_count"] == 6
