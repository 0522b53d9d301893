"""Calibrating in several passes: the same Grams as in one, from fewer blocks, wherever the model lies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from experiments.models.adapter import Loaded, Placement
from experiments.models.families import adapter_of
from experiments.samples import draw_lines
from experiments.stages.grams import Passes, collect_grams
from experiments.stages.plan import make_plan
from tailor.checkpoint import Checkpoint
from tailor.errors import EmptyCalibration
from tests.experiments.pairs import FAMILIES, Pair, make_pair

CPU = Placement(torch.device("cpu"))
TEXT_MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
OFFLOADED = {
    "llama": TEXT_MAP,
    "qwen": TEXT_MAP,
    "llava": {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "disk",
        "model.language_model": "disk",
        "lm_head": "disk",
    },
    "instructblip": {
        "vision_model": "cpu",
        "query_tokens": "cpu",
        "qformer": "disk",
        "language_projection": "disk",
        "language_model": "disk",
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


def load(pair: Pair, placement: Placement = CPU) -> Loaded:
    return adapter_of(pair.finetuned).load(pair.finetuned, "auto", placement)


def passes(pair: Pair, loaded: Loaded, *, weights_change: bool = False) -> Passes:
    adapter = adapter_of(pair.finetuned)
    samples, _ = draw_lines(pair.samples, 10, 0, seed=0)
    layers = [name for name in Checkpoint(pair.finetuned) if "vision" not in name]
    plan = make_plan(adapter, loaded, samples, layers)
    return Passes(adapter, loaded, samples, 4, plan, weights_change)


@pytest.mark.parametrize("memory_bytes", [1, 50_000, 10**9])
def test_groups_give_the_grams_of_a_single_pass(pair: Pair, memory_bytes: int) -> None:
    made = passes(pair, load(pair))
    whole = collect_grams(made.adapter, made.loaded, made.samples, list(Checkpoint(pair.finetuned)), 4, "test")
    groups = made.plan.groups(memory_bytes)
    assert (len(groups) == 1) == (memory_bytes == 10**9)
    for group, upcoming in zip(groups, [*groups[1:], ()], strict=True):
        sizes = [4 * made.plan.widths[key] ** 2 for key in group]
        assert len(sizes) == 1 or sum(sizes) <= memory_bytes
        grams = made.collect(group, "test", upcoming)
        for name in grams:
            assert torch.equal(grams[name], whole[name]), name
            assert grams.token_count(name) == whole.token_count(name)


def test_an_offloaded_model_gives_the_same_grams(pair: Pair, tmp_path: Path) -> None:
    here, away = (
        passes(pair, load(pair, placement))
        for placement in (CPU, Placement(torch.device("cpu"), OFFLOADED[pair.family], tmp_path / "offload"))
    )
    assert any(parameter.is_meta for parameter in away.loaded.model.parameters())
    groups = here.plan.groups(50_000)
    for group, upcoming in zip(groups, [*groups[1:], ()], strict=True):
        expected, found = here.collect(group, "test", upcoming), away.collect(group, "test", upcoming)
        assert set(found) == set(expected)
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_weights_set_between_passes_reach_the_layers_above(pair: Pair) -> None:
    """Each Gram is that of a model in which all layers met before, and no others, have their new weights."""
    made = passes(pair, load(pair), weights_change=True)
    pretrained = Checkpoint(pair.pretrained)
    settled = load(pair)
    for key in made.plan.widths:
        grams = made.collect((key,), "test")
        expected = collect_grams(made.adapter, settled, made.samples, [key], 4, "test")
        assert torch.allclose(grams[key], expected[key], rtol=1e-5, atol=1e-7), key
        weights = [(layer, pretrained[layer]) for layer in made.plan.layers[key]]
        for loaded in (made.loaded, settled):
            loaded.set_weights(weights)


@pytest.mark.parametrize("weights_change", [False, True])
def test_blocks_of_the_language_model_run_a_few_times_over_all_passes(tmp_path: Path, weights_change: bool) -> None:
    pair = make_pair(tmp_path / "pair", "llama")
    made = passes(pair, load(pair), weights_change=weights_change)
    runs: Counter[int] = Counter()
    for index, block in enumerate(made.loaded.model.model.layers):
        attention = block.self_attn  # a block that is replayed runs nothing inside
        attention.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
    groups = [(key,) for key in made.plan.widths]
    for group, upcoming in zip(groups, [*groups[1:], ()], strict=True):
        made.collect(group, "test", upcoming)
    batch_count = 3
    assert len(groups) == 3 * 4 + 1  # q/k/v, o, gate/up, down of three blocks, and the head
    # A block runs in the passes of its own four inputs, and once more for the outputs that the next one starts from;
    # and each pass runs one batch without replaying, to compare.
    assert all(count <= 6 * batch_count + len(groups) for count in runs.values())
    assert max(runs.values()) < len(groups) * batch_count


def test_a_layer_that_no_sample_reaches_is_named(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair", "llava")
    loaded, adapter = load(pair), adapter_of(pair.finetuned)
    samples, _ = draw_lines(pair.samples, 3, 0, seed=0)
    text_alone = [type(sample)(None, sample.prompt, sample.answer) for sample in samples]
    layers = ["multi_modal_projector.linear_1.weight", "language_model.lm_head.weight"]
    with pytest.raises(EmptyCalibration, match=r"multi_modal_projector\.linear_1.*1 of 2 layers"):
        make_plan(adapter, loaded, text_alone, layers)
    mixed = make_plan(adapter, loaded, [*text_alone, *samples], layers)
    assert list(mixed.layers) == layers


def test_a_block_whose_outputs_others_read_is_not_replayed(tmp_path: Path) -> None:
    """A LLaVA that takes its picture from an early vision layer, with the vision tower calibrated as well."""
    pair = make_pair(tmp_path / "pair", "llava")
    for folder in (pair.pretrained, pair.finetuned):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -3}))
    loaded, adapter = load(pair), adapter_of(pair.finetuned)
    samples, _ = draw_lines(pair.samples, 5, 0, seed=0)
    # The last vision layers are beyond what is read: no token of theirs reaches the language model.
    layers = [name for name in Checkpoint(pair.finetuned) if "encoder.layers.3" not in name]
    plan = make_plan(adapter, loaded, samples, layers)
    whole = Passes(adapter, loaded, samples, 4, plan).collect(tuple(plan.widths), "test")
    made, groups = Passes(adapter, loaded, samples, 4, plan), plan.groups(1)
    for group, upcoming in zip(groups, [*groups[1:], ()], strict=True):
        grams = made.collect(group, "test", upcoming)
        for name in grams:
            assert torch.equal(grams[name], whole[name]), name
