"""Fusing given checkpoints, from folders to a folder that transformers loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, InstructBlipForConditionalGeneration, LlavaForConditionalGeneration

from experiments.models.adapter import Placement
from experiments.models.causal_lm import CausalLM
from experiments.samples import draw_lines
from experiments.stages.grams import Passes, collect_grams
from tailor.checkpoint import Checkpoint
from tailor.decorate import decorate
from tailor.errors import CheckpointMismatch
from tailor.gram import Grams, damp
from tailor.method import GramEvidence
from tailor.methods.stitched import Stitched
from tailor.patch import Patch
from tests.experiments.conftest import ROOT
from tests.experiments.pairs import FAMILIES, FROZEN, Fuse, Pair, make_pair, write_samples

CLASSES = {"llava": LlavaForConditionalGeneration, "instructblip": InstructBlipForConditionalGeneration}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


def test_every_family_is_calibrated_and_fused(pair: Pair, fuse: Fuse, tmp_path: Path) -> None:
    fuse(*pair.arguments, f"out={tmp_path / 'out'}", f"calibration.data={pair.samples}", "calibration.held_out=2")
    base, tuned, fused = (Checkpoint(folder) for folder in (pair.pretrained, pair.finetuned, tmp_path / "out"))
    assert list(fused) == list(base)
    for name in base:
        changed = int((base[name] != fused[name]).sum())
        if any(part in name for part in FROZEN):
            assert changed == 0, name
        else:
            assert changed == pytest.approx(0.1 * base[name].numel(), abs=1), name
    loaded = CLASSES.get(pair.family, AutoModelForCausalLM).from_pretrained(tmp_path / "out")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == base.numel
    assert tuned.other_files() == fused.other_files()


def test_lora_adapters_are_merged_and_then_fused(fuse: Fuse, tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair", "llava")
    model = LlavaForConditionalGeneration.from_pretrained(pair.pretrained)
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|down_proj)")
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapters")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")

    fuse(
        f"pretrained={pair.pretrained}",
        f"finetuned={tmp_path / 'adapters'}",
        f"out={tmp_path / 'all'}",
        "baseline=finetune",
    )
    found, expected = Checkpoint(tmp_path / "all"), Checkpoint(tmp_path / "merged")
    assert list(found) == list(expected)
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-6), name
    changed = [name for name in found if not torch.equal(found[name], Checkpoint(pair.pretrained)[name])]
    assert len(changed) == 6  # two kinds of layers in three blocks
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "all")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in Checkpoint(folder).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("llama"), "llama")


def test_groups_and_devices_leave_no_trace_in_the_result(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    settings = (*llama.arguments, f"calibration.data={llama.samples}")
    fuse(*settings, f"out={tmp_path / 'one'}", f"patch={tmp_path / 'one.safetensors'}")
    fuse(
        *settings,
        f"out={tmp_path / 'many'}",
        f"patch={tmp_path / 'many.safetensors'}",
        "calibration.memory_gb=1e-5",
        "device=[cpu,cpu]",
    )
    assert weights(tmp_path / "one") == weights(tmp_path / "many")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "many.safetensors").read_bytes()


def test_an_interrupted_calibration_goes_on(
    llama: Pair, fuse: Fuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*llama.arguments, f"calibration.data={llama.samples}", "calibration.memory_gb=1e-5")
    collect, calls = Passes.collect, []

    def killed_at_the_third(self: Passes, *arguments: object) -> Grams:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return collect(self, *arguments)

    monkeypatch.setattr(Passes, "collect", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        fuse(*settings, f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
    stages = fuse(*settings, f"out={tmp_path / 'out'}").stages
    reused = [stage["reused"] for name, stage in stages.items() if name.startswith("grams")]
    assert reused == [True, True] + [False] * (len(reused) - 2)
    again = fuse(*settings, f"out={tmp_path / 'again'}", "sparsity=0.2").stages
    assert all(stage["reused"] for name, stage in again.items() if name.startswith("grams"))


def test_sequential_inputs_are_those_of_the_fused_layers_below(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    settings = (*llama.arguments, f"calibration.data={llama.samples}", "dtype=float32", "seed=3")
    fuse(*settings, f"out={tmp_path / 'out'}", "calibration.inputs=sequential", "calibration.held_out=3")
    fused, adapter = Checkpoint(tmp_path / "out"), CausalLM("text")
    loaded = adapter.load(llama.finetuned, torch.float32, Placement(torch.device("cpu")))
    samples, _ = draw_lines(llama.samples, 10, 3, seed=3)
    last = "model.layers.2.mlp.down_proj.weight"
    loaded.set_weights((name, fused[name]) for name in fused if name not in (last, "lm_head.weight"))
    gram = damp(collect_grams(adapter, loaded, samples, [last], 8, "test")[last], 0.01)
    base, tuned = Checkpoint(llama.pretrained)[last], Checkpoint(llama.finetuned)[last]
    mask = fused[last] != base
    expected = decorate(tuned - base, mask, gram, "exact")
    assert torch.allclose(fused[last] - base, expected, atol=1e-5)


def test_shares_of_two_processes_stack_to_the_whole(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    settings = (*llama.arguments, f"calibration.data={llama.samples}")
    fuse(*settings, f"out={tmp_path / 'whole'}", "threads=1")
    scopes = ("[model.layers.0.*,model.layers.1.*]", "[model.layers.2.*,model.norm.*,model.embed*,lm_head.*]")
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "experiments.fuse", *settings, "threads=1"),
                *(f"scope={scope}", f"patch={number}.safetensors", f"home={tmp_path / f'home{number}'}"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for number, scope in enumerate(scopes)
    ]
    assert [process.wait() for process in started] == [0, 0]
    stacked = dict(Checkpoint(llama.pretrained))
    for number in range(2):
        stacked |= dict(Patch.load(tmp_path / f"{number}.safetensors").apply_to(stacked))
    assert {name: tensor.numpy().tobytes() for name, tensor in stacked.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in Checkpoint(tmp_path / "whole").items()
    }


def test_two_sided_tailoring_holds_what_is_to_be_retained(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    retained = write_samples(tmp_path / "retained", 8, with_image=False)
    settings = (*llama.arguments, f"calibration.data={llama.samples}", f"calibration.retain={retained}")
    drift = {}
    for mu in (0, 10):
        two_sided = ("baseline=tailor_two_sided", f"baseline.mu={mu}", f"out={tmp_path / str(mu)}")
        rows = fuse(*settings, *two_sided).report["tensors"]
        drift[mu] = {row["name"]: row["drift"]["two_sided"] for row in rows if row.get("drift")}
    assert drift[0].keys() == drift[10].keys() != set()
    assert all(drift[10][name] < drift[0][name] for name in drift[0])


@pytest.mark.parametrize(("base", "tuned"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_half_precision_pairs_in_shards(base: torch.dtype, tuned: torch.dtype, fuse: Fuse, tmp_path: Path) -> None:
    pretrained = make_pair(tmp_path / "base", "llama", base, max_shard_size="20KB").pretrained
    finetuned = make_pair(tmp_path / "tuned", "llama", tuned, max_shard_size="50KB").finetuned
    samples = write_samples(tmp_path / "samples", 4, with_image=False)
    out = tmp_path / "out"
    folders = (f"pretrained={pretrained}", f"finetuned={finetuned}", f"out={out}")
    totals = fuse(*folders, f"calibration.data={samples}", "max_shard_size=30KB").report["totals"]
    assert {tensor.dtype for tensor in Checkpoint(out).values()} == {base}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == base  # as its config says, which was the fine-tuned one's
    assert 0.08 < totals["changed_fraction"] <= 0.1
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
    AutoModelForCausalLM.from_pretrained(out)


def test_rows_that_fine_tuning_added_to_the_vocabulary(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.finetuned)
    known = model.config.vocab_size
    model.resize_token_embeddings(known + 3, mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    folders = (f"pretrained={llama.pretrained}", f"finetuned={tmp_path / 'grown'}", f"out={tmp_path / 'out'}")
    with pytest.raises(
        CheckpointMismatch, match=rf"lm_head\.weight has rows {known} to {known + 2} more.*keep_finetuned"
    ):
        fuse(*folders, "baseline=magnitude")
    report = fuse(*folders, "baseline=magnitude", "embeddings=keep_finetuned_rows").report
    fused, grown, base = (Checkpoint(path) for path in (tmp_path / "out", tmp_path / "grown", llama.pretrained))
    name = "model.embed_tokens.weight"
    assert torch.equal(fused[name][known:], grown[name][known:])
    assert int((fused[name][:known] != base[name]).sum()) == round(0.1 * base[name].numel())
    row = next(row for row in report["tensors"] if row["name"] == name)
    assert row["added_row_count"] == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == known + 3


@pytest.mark.parametrize("how", ["paper", "mean", "joint"])
def test_several_fine_tuned_models_are_stitched(how: str, llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    other = make_pair(tmp_path / "other", "llama", seed=1)
    folders = (f"pretrained={llama.pretrained}", f"finetuned=[{llama.finetuned},{other.finetuned}]")
    data = f"calibration.data=[{llama.samples},{other.samples}]"
    patch = tmp_path / "patch.safetensors"
    settings = (*folders, data, f"baseline=tailor_stitch_{how}", f"out={tmp_path / 'out'}", f"patch={patch}")
    report = fuse(*settings, "calibration.memory_gb=1e-5").report
    assert report["totals"]["tensor_counts"] == {"fused": 30, "kept": 0, "copied": 0, "tied": 0}
    assert 0.05 < report["totals"]["changed_fraction"] <= 0.1
    folders = [Checkpoint(folder) for folder in (llama.finetuned, other.finetuned)]
    evidence = []
    for pair in (llama, other):
        adapter = CausalLM("text")
        loaded = adapter.load(pair.finetuned, torch.float32, Placement(torch.device("cpu")))
        samples, _ = draw_lines(pair.samples, 128, 0, seed=0)
        evidence.append(GramEvidence(collect_grams(adapter, loaded, samples, list(folders[0]), 8, "test")))
    decorator = "exact" if how == "joint" else "sparsegpt"
    method = Stitched(how, 0.1, 0.5, decorator, 0.01)
    expected, _ = method.stitch(Checkpoint(llama.pretrained), folders, evidence=evidence, seed=0)
    found = Patch.load(patch)
    assert found.header["tasks"] == ["finetuned", "finetuned"]
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name].xors, tensor.xors), name


def test_another_fine_tuning_of_the_same_size_and_time_is_another(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    other = make_pair(tmp_path / "other", "llama", seed=1)
    for folder in (llama.finetuned, other.finetuned):
        os.utime(folder / "model.safetensors", (0, 0))
    settings = (f"pretrained={llama.pretrained}", f"calibration.data={llama.samples}")
    for name, finetuned in (("one", llama.finetuned), ("two", other.finetuned)):
        fuse(*settings, f"finetuned={finetuned}", f"out={tmp_path / name}")
    assert weights(tmp_path / "one") != weights(tmp_path / "two")


def test_outside_a_scope_sequential_inputs_are_pretrained(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    settings = (*llama.arguments, f"calibration.data={llama.samples}", "dtype=float32")
    key, out = "model.layers.1.self_attn.q_proj.weight", tmp_path / "out"
    fuse(*settings, f"out={out}", "calibration.inputs=sequential", "scope=[model.layers.1.self_attn.*]")
    adapter, base, tuned, fused = CausalLM("text"), *map(Checkpoint, (llama.pretrained, llama.finetuned, out))
    loaded = adapter.load(llama.pretrained, torch.float32, Placement(torch.device("cpu")))
    samples, _ = draw_lines(llama.samples, 10, 0, seed=0)
    gram = damp(collect_grams(adapter, loaded, samples, [key], 8, "test")[key], 0.01)
    expected = decorate(tuned[key] - base[key], fused[key] != base[key], gram, "exact")
    assert torch.allclose(fused[key] - base[key], expected, atol=1e-5)


def test_two_sided_tailoring_takes_layers_one_by_one_too(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    retained = write_samples(tmp_path / "retained", 4, with_image=False)
    settings = (*llama.arguments, f"calibration.data={llama.samples}", f"calibration.retain={retained}")
    report = fuse(
        *settings, "baseline=tailor_two_sided", "calibration.inputs=sequential", f"out={tmp_path / 'out'}"
    ).report
    assert report["totals"]["changed_fraction"] == pytest.approx(0.1, abs=0.01)


def test_a_scope_without_linear_layers(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    settings = (*llama.arguments, f"calibration.data={llama.samples}", "scope=[model.norm.*,*layernorm*]")
    totals = fuse(*settings, f"out={tmp_path / 'out'}").report["totals"]
    assert totals["tensor_counts"]["fused"] == 7
    assert totals["gram_tensor_count"] == 0


def test_fine_tuning_that_changed_nothing(llama: Pair, fuse: Fuse, tmp_path: Path) -> None:
    settings = (f"pretrained={llama.pretrained}", f"finetuned={llama.pretrained}", f"calibration.data={llama.samples}")
    assert fuse(*settings, f"out={tmp_path / 'out'}").report["totals"]["changed_count"] == 0
    assert weights(tmp_path / "out") == weights(llama.pretrained)
