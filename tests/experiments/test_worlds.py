from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from experiments.errors import ConfigError, TrainingError
from experiments.models.adapter import Sample
from experiments.models.llava import Llava
from experiments.stages.pretrain import DigitsLlava, Phase, optimise, own_turn, pack
from experiments.worlds import scenes, tiny_models
from experiments.worlds.captions import caption, references
from experiments.worlds.digits import CaptionRows, QuestionRows
from experiments.worlds.pool import turns, vocabulary
from experiments.worlds.questions import SKILLS, annotate
from experiments.worlds.scenes import Item, Scene, generator, is_novel, render, sample_scene

SCENE = Scene((Item(3, "red", 0), Item(8, "blue", 3)), "studio")


def test_questions_about_a_scene_have_the_answers_one_sees() -> None:
    asked = {
        (question.text, question.answer)
        for name, skill in SKILLS.items()
        for seed in range(40)
        for question in [skill.ask(SCENE, generator(name, seed))]
    }
    assert asked == {
        ("what colour is top left ?", "red"),
        ("what colour is bottom right ?", "blue"),
        ("which number is top left ?", "three"),
        ("which number is bottom right ?", "eight"),
        ("where is red ?", "top left"),
        ("where is blue ?", "bottom right"),
        ("is top left even or odd ?", "odd"),
        ("is bottom right even or odd ?", "even"),
        ("is top left larger than four ?", "no"),
        ("is bottom right larger than four ?", "yes"),
        ("is there a top left number ?", "yes"),
        ("is there a top right number ?", "no"),
        ("is there a bottom left number ?", "no"),
        ("is there a bottom right number ?", "yes"),
        ("how many numbers ?", "two"),
        ("what colour is opposite bottom right ?", "red"),
        ("what colour is opposite top left ?", "blue"),
        ("which fruit has the colour of top left ?", "cherry"),
        ("which fruit has the colour of bottom right ?", "plum"),
    }


def test_annotators_mostly_agree() -> None:
    rng = generator("annotators")
    counts = [annotate(SKILLS["colour"], "red", rng).count("red") for _ in range(300)]
    assert set(counts) == {7, 8, 9, 10}
    assert set(annotate(SKILLS["occupied"], "yes", rng)) <= {"yes", "no"}


def test_captions_tell_the_truth() -> None:
    rng = generator("truth")
    for _ in range(100):
        everyday, street = caption(SCENE, "everyday", rng), caption(SCENE, "street", rng)
        assert any(word in everyday for word in ("three", "eight"))
        assert not {"green", "yellow", "one", "five"} & set(f"{everyday} {street}".split())
        assert any(opening in street for opening in ("signs", "look"))
    assert len(references(SCENE, "everyday", rng)) == 5


@pytest.mark.parametrize(("novelty", "novel"), [("none", {0}), ("some", {1}), ("all", {2, 3}), ("any", {0, 1, 2, 3})])
def test_novelty_counts_pairs_never_captioned(novelty: str, novel: set[int]) -> None:
    rng = generator("novelty")
    drawn = [sample_scene(rng, "studio", novelty) for _ in range(400)]
    assert {sum(is_novel(item.digit, item.colour) for item in scene.items) for scene in drawn} <= novel
    assert {len(scene.items) for scene in drawn} == {2, 3}


def test_pretraining_never_captions_a_novel_pair() -> None:
    rng = generator("pretraining captions")
    drawn = [sample_scene(rng) for _ in range(200)]
    captioned = [scene for scene in drawn if any(prompt.endswith("caption .") for prompt, _ in turns(scene, rng))]
    assert captioned
    assert not any(is_novel(item.digit, item.colour) for scene in captioned for item in scene.items)


def test_test_scenes_show_other_handwriting_than_training_scenes() -> None:
    data = load_digits()
    train, test = (scenes._glyphs(split) for split in ("train", "test"))
    assert sum(map(len, train.values())) == 1400
    assert sum(map(len, test.values())) == len(data.target) - 1400
    pictures = {split: np.asarray(render(SCENE, generator(1), split)) for split in ("train", "dev", "test")}
    assert np.array_equal(pictures["train"], pictures["dev"])
    assert not np.array_equal(pictures["train"], pictures["test"])


def test_rows_have_the_real_data_sets_columns() -> None:
    captions = CaptionRows("test", "street", "street", "any", 3).load()
    questions = QuestionRows("test", "studio", "colour", 3, single_answer=False).load()
    single = QuestionRows("test", "studio", "opposite", 3, single_answer=True).load()
    assert set(captions.column_names) == {"image", "image_id", "captions"}
    assert set(questions.column_names) == {"image", "question_id", "question", "answers"}
    assert set(single.column_names) == {"image", "id", "question", "answer"}
    assert captions[0]["image"].size == (32, 32)
    assert [len(row["captions"]) for row in captions] == [5, 5, 5]
    assert [len(row["answers"]) for row in questions] == [10, 10, 10]


def test_more_rows_begin_with_the_fewer() -> None:
    few, many = (QuestionRows("dev", "studio", "digit", count, single_answer=False).load() for count in (2, 4))
    assert few["question"] == many["question"][:2]
    assert few["answers"] == many["answers"][:2]


def test_an_unknown_skill_is_named() -> None:
    with pytest.raises(ConfigError, match="'sing' is not one of colour"):
        QuestionRows("test", "studio", "sing", 3, single_answer=False)


@pytest.mark.parametrize("build", [tiny_models.llava, tiny_models.instructblip])
def test_every_word_of_the_world_is_in_the_vocabulary(build) -> None:
    _, processor = build(vocabulary())
    unknown = processor.tokenizer.unk_token_id
    rng = generator("words")
    for _ in range(300):
        scene = sample_scene(rng)
        texts = [caption(scene, style, rng) for style in ("everyday", "street")]
        texts += [skill.ask(scene, rng).text for skill in SKILLS.values()]
        for ids in processor.tokenizer(texts)["input_ids"]:
            assert unknown not in ids


def test_packed_questions_cost_what_single_ones_do() -> None:
    """Turns that share an image must not see each other: logits equal those of separate conversations."""
    torch.manual_seed(0)
    model, processor = tiny_models.llava(vocabulary())
    model.eval()
    pairs = [("where is red ?", "top left"), ("how many numbers ?", "two"), ("what colour is top left ?", "red")]
    pixels = torch.randn(1, 3, 32, 32)

    def logits(conversation: list[tuple[str, str]]) -> torch.Tensor:
        ids, _, turn, positions = (torch.tensor([column]) for column in pack(processor.tokenizer, conversation))
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=own_turn(turn), position_ids=positions, pixel_values=pixels)
        return out.logits[0, (turn[0] > 0)]

    together = logits(pairs)
    apart = torch.cat([logits([pair]) for pair in pairs])
    assert torch.allclose(together, apart, atol=1e-5)


def test_pretraining_asks_as_the_adapter_does() -> None:
    _, processor = tiny_models.llava(vocabulary())
    rng = generator("same conversation")
    image = render(SCENE, rng, "train")
    for prompt, answer in turns(SCENE, rng):
        packed, _, _, _ = pack(processor.tokenizer, [(prompt, answer)])
        batch = Llava("digits_llava", system="").training_batch(processor, [Sample(image, prompt, answer)])
        assert batch["input_ids"][0].tolist() == packed


def test_pretraining_is_deterministic(tmp_path) -> None:
    base = DigitsLlava(scenes=16, seed=0, vision=Phase(2, 4, 1e-3), language=Phase(2, 2, 1e-3))
    base.build(tmp_path / "a")
    base.build(tmp_path / "b")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_a_loss_that_is_not_finite_stops_pretraining() -> None:
    weight = torch.zeros(1, requires_grad=True)
    with pytest.raises(TrainingError, match="pretraining, vision: the loss is nan"):
        optimise("vision", [weight], lambda indices, rng: (weight * float("nan")).sum(), 4, Phase(3, 2, 1e-3), 0)
