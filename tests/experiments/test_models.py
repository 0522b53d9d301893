"""Adapters of both families on untrained tiny models: batches, names, token masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evaluation.prompts import Generation
from evaluation.records import Example
from experiments.errors import ModelError
from experiments.models.adapter import IGNORED, Adapter, Loaded, Placement, Sample, tensor_names
from experiments.models.instructblip import InstructBlip
from experiments.models.llava import RENAMINGS, Llava
from experiments.stages.evaluate import generate
from experiments.stages.grams import collect_grams
from experiments.stages.target import TargetLoss
from experiments.worlds import tiny_models
from experiments.worlds.pool import vocabulary
from experiments.worlds.questions import SKILLS
from experiments.worlds.scenes import generator, render, sample_scene
from tailor.checkpoint import Checkpoint
from tailor.errors import NotFinite

ADAPTERS: dict[str, tuple[Adapter, Callable[[list[str]], tuple[Any, Any]]]] = {
    "llava": (Llava("digits_llava", system=""), tiny_models.llava),
    "instructblip": (InstructBlip("digits_instructblip"), tiny_models.instructblip),
}


@dataclass(frozen=True)
class Family:
    name: str
    adapter: Adapter
    folder: Path

    def load(self) -> Loaded:
        return self.adapter.load(self.folder, torch.float32, Placement(torch.device("cpu")))


@pytest.fixture(scope="module", params=ADAPTERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    adapter, build = ADAPTERS[request.param]
    torch.manual_seed(0)
    model, processor = build(vocabulary())
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Family(request.param, adapter, folder)


def samples(count: int = 6) -> list[Sample]:
    """Questions and answers of different lengths."""
    rng = generator("model tests")
    made = []
    for _ in range(count):
        scene = sample_scene(rng)
        for name in ("where", "fruit", "count"):
            question = SKILLS[name].ask(scene, rng)
            made.append(Sample(render(scene, rng, "train"), question.text, question.answer))
    return made[:count]


def test_the_loss_is_on_answers_alone(family: Family) -> None:
    loaded = family.load()
    batch = family.adapter.training_batch(loaded.processor, samples())
    tokenizer = loaded.processor.tokenizer
    for row, labels, mask, sample in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], samples(), strict=True
    ):
        learnt = labels != IGNORED
        assert tokenizer.decode(row[learnt]) == f"{sample.answer} </s>"
        prompt = tokenizer.decode(row[~learnt & mask.bool()], skip_special_tokens=True)
        assert sample.prompt in prompt
        assert sample.answer not in prompt
        assert (row[~mask.bool()] == tokenizer.pad_token_id).all()


def test_prompts_of_training_and_evaluation_are_the_same_tokens(family: Family) -> None:
    loaded = family.load()
    for sample in samples(3):
        asked = family.adapter.prompt_batch(loaded.processor, [sample.image], [sample.prompt])["input_ids"][0]
        taught = family.adapter.training_batch(loaded.processor, [sample])
        assert taught["input_ids"][0][taught["labels"][0] == IGNORED].tolist() == asked.tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_do_not_depend_on_the_batch(family: Family, beams: int) -> None:
    loaded = family.load()
    examples = [Example(str(i), sample.prompt, ("x",), sample.image) for i, sample in enumerate(samples())]
    settings = Generation(num_beams=beams, max_new_tokens=5, min_new_tokens=5)
    alone, together = (
        generate(family.adapter, loaded, examples, settings, batch_size, "test") for batch_size in (1, 4)
    )
    assert alone == together
    assert [prediction.id for prediction in alone] == [example.id for example in examples]
    for prediction in alone:  # new tokens alone, special ones left out: neither prompt nor image slots
        assert 0 < len(prediction.text.split()) <= 5


def test_names_cover_the_checkpoint(family: Family) -> None:
    assert set(family.load().tensor_names.values()) == set(Checkpoint(family.folder))


def test_a_model_that_does_not_fit_is_told_tensor_by_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = tiny_models.llava(vocabulary())
    model.save_pretrained(tmp_path)
    other, _ = tiny_models.llava(["few", "words"])
    with pytest.raises(ModelError, match=r"embed_tokens.*in memory.*2 in all.*this architecture"):
        tensor_names(other, Checkpoint(tmp_path), RENAMINGS)
    with pytest.raises(ModelError, match=r"language_model\.embed_tokens\.weight: none of any name is in"):
        tensor_names(model, Checkpoint(tmp_path), RENAMINGS[1:])


def test_a_sharded_checkpoint_loads_alike(family: Family, tmp_path: Path) -> None:
    loaded = family.load()
    loaded.model.save_pretrained(tmp_path, max_shard_size="200KB")
    loaded.processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = family.adapter.load(tmp_path, torch.float32, Placement(torch.device("cpu")))
    assert sharded.tensor_names == loaded.tensor_names
    for name, parameter in loaded.parameters.items():
        assert torch.equal(parameter, sharded.parameters[name]), name


def linear_layers(loaded: Loaded) -> list[str]:
    modules = dict(loaded.model.named_modules())
    return [
        name
        for path, name in loaded.tensor_names.items()
        if isinstance(modules[path.rpartition(".")[0]], nn.Linear) and path.endswith(".weight")
    ]


def test_padding_never_enters_a_gram(family: Family) -> None:
    """One sample at a time there is no padding; in batches there is, on other tokens in every part of the model."""
    loaded = family.load()
    layers = [name for name in linear_layers(loaded) if not name.startswith("vision")]
    alone, together = (
        collect_grams(family.adapter, loaded, samples(), layers, batch_size, "test") for batch_size in (1, 6)
    )
    assert set(alone) == set(together) == set(layers)
    for name in layers:
        assert alone.token_count(name) == together.token_count(name), name
        scale = alone[name].diagonal().mean()
        assert torch.allclose(alone[name] / scale, together[name] / scale, atol=2e-4), name


def test_a_gram_is_the_second_moment_of_what_the_layer_reads(family: Family) -> None:
    loaded = family.load()
    path = "model.language_model.layers.1.mlp.down_proj" if family.name == "llava" else "language_projection"
    name = loaded.tensor_names[f"{path}.weight"]
    seen: list[torch.Tensor] = []
    hook = loaded.model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for sample in samples():
        batch = family.adapter.training_batch(loaded.processor, [sample])
        loaded.model(**batch)
    hook.remove()
    tokens = torch.cat([each.flatten(0, -2) for each in seen]).double()
    expected = 2 / len(tokens) * tokens.T @ tokens
    gram = collect_grams(family.adapter, loaded, samples(), [name], 4, "test")[name]
    assert torch.allclose(gram.double(), expected, rtol=1e-4, atol=1e-5 * expected.diagonal().mean().item())


def test_layers_that_read_one_input_share_its_gram(family: Family) -> None:
    loaded = family.load()
    grams = collect_grams(family.adapter, loaded, samples(), linear_layers(loaded), 6, "test")
    groups: dict[str, set[str]] = {}
    for name, key in grams.keys_of_layers.items():
        groups.setdefault(key, set()).add(name.removesuffix(".weight").rpartition(".")[2])
    shared = sorted(sorted(group) for group in groups.values() if len(group) > 1)
    expected = 3 * [["gate_proj", "up_proj"]] + 3 * [["k_proj", "q_proj", "v_proj"]]
    if family.name == "llava":
        assert shared == sorted(expected + 4 * [["k_proj", "q_proj", "v_proj"]])  # the vision tower's
    else:
        # Every cross-attention reads the same image patches: one Gram for the keys and values of all four layers.
        assert shared == sorted(expected + 4 * [["key", "query", "value"]] + [["key", "value"]])


def test_an_input_that_is_not_finite_is_named(family: Family) -> None:
    loaded = family.load()
    name = next(name for name in linear_layers(loaded) if name.endswith("up_proj.weight"))
    with torch.no_grad():
        loaded.parameters[name.replace("mlp.up_proj", "post_attention_layernorm")].fill_(float("nan"))
    with pytest.raises(NotFinite, match=name.replace(".", r"\.")):
        collect_grams(family.adapter, loaded, samples(), [name], 6, "test")


def test_the_target_gradient_is_that_of_the_mean_over_answer_tokens(family: Family) -> None:
    loaded = family.load()
    name = next(name for name in linear_layers(loaded) if name.endswith("o_proj.weight"))
    weights = {name: loaded.parameters[name].detach().clone()}
    in_parts = TargetLoss(family.adapter, loaded, samples(), [], batch_size=2).gradient(weights)[name]
    batch = family.adapter.training_batch(loaded.processor, samples())
    loaded.model.zero_grad()
    logits = loaded.model(**batch).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    nn.functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED]).backward()
    at_once = loaded.parameters[name].grad
    assert at_once is not None
    assert torch.allclose(in_parts, at_once, atol=1e-6)


def test_the_target_score_is_the_share_of_tokens_ranked_first(family: Family) -> None:
    loaded = family.load()
    task = TargetLoss(family.adapter, loaded, samples(4), samples()[4:], batch_size=3)
    right = total = 0
    for sample in samples():
        batch = family.adapter.training_batch(loaded.processor, [sample])
        with torch.no_grad():
            best = loaded.model(**batch).logits[0, :-1].argmax(-1)
        labels = batch["labels"][0, 1:]
        right += int((best == labels)[labels != IGNORED].sum())
        total += int((labels != IGNORED).sum())
    assert task.score({}) == pytest.approx(100 * right / total)
