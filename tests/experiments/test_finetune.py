"""Fine-tuning of an untrained tiny model: what is learnt, in which order, and what stops it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.errors import TrainingError
from experiments.models.adapter import IGNORED, Placement, Sample
from experiments.models.llava import Llava
from experiments.stages.finetune import Training
from experiments.worlds import tiny_models
from experiments.worlds.pool import vocabulary
from experiments.worlds.scenes import generator, render, sample_scene

ADAPTER = Llava("digits_llava", system="")
CPU = torch.device("cpu")


def training(**changes: object) -> Training:
    fields = {
        "scope": ("language_model.lm_head.weight",),
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "max_gradient_norm": 1e9,
    }
    return Training(**(fields | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model, processor = tiny_models.llava(vocabulary())
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def rows(count: int = 8, answers: tuple[str, ...] = ("red", "blue")) -> list[list[Sample]]:
    rng = generator("fine-tuning tests")
    images = [render(sample_scene(rng), rng, "train") for _ in range(count)]
    return [[Sample(image, "where is red ?", answer) for answer in answers] for image in images]


def test_every_row_is_learnt_once_an_epoch_its_answers_in_turn(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sample] = []
    batch = Llava.training_batch

    def watch(self: Llava, processor: object, samples: list[Sample]) -> dict[str, torch.Tensor]:
        seen.extend(samples)
        return batch(self, processor, samples)

    monkeypatch.setattr(Llava, "training_batch", watch)
    losses = training().finetune(ADAPTER, base, rows(), tmp_path / "out", 0, CPU)
    assert len(losses) == 4
    assert [sample.answer for sample in seen].count("red") == 8
    assert [sample.answer for sample in seen].count("blue") == 8


def test_the_first_step_is_plain_cross_entropy_over_answer_tokens(base: Path, tmp_path: Path) -> None:
    samples = rows(4, ("top left",))
    losses = training(epochs=1).finetune(ADAPTER, base, samples, tmp_path / "out", 0, CPU)
    loaded = ADAPTER.load(base, torch.float32, Placement(CPU))
    total = count = 0.0
    for (sample,) in samples:
        one = ADAPTER.training_batch(loaded.processor, [sample])
        with torch.no_grad():
            chances = loaded.model(**one).logits[0, :-1].double().log_softmax(-1)
        labels = one["labels"][0, 1:]
        for position in (labels != IGNORED).nonzero()[:, 0].tolist():
            total -= float(chances[position, labels[position]])
            count += 1
    assert losses == [pytest.approx(total / count, abs=1e-4)]


def test_seeds_decide_the_order_and_nothing_else_does(base: Path, tmp_path: Path) -> None:
    runs = {
        name: training().finetune(ADAPTER, base, rows(), tmp_path / name, seed, CPU)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    }
    assert runs["a"] == runs["b"]
    assert runs["a"] != runs["c"]
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in runs}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]


def test_nothing_to_learn_from_is_an_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no row to learn from"):
        training().finetune(ADAPTER, base, [], tmp_path / "out", 0, CPU)


def test_a_loss_that_is_not_finite_stops_at_its_step(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step [12]: (loss|grad_norm) is .*lower training\.learning_rate"):
        training(learning_rate=1e38).finetune(ADAPTER, base, rows(), tmp_path / "out", 0, CPU)
    assert not (tmp_path / "out").exists()


def test_a_loss_of_nothing_is_not_taken_for_zero(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Llava.training_batch

    def without_labels(self: Llava, processor: object, samples: list[Sample]) -> dict[str, torch.Tensor]:
        made = batch(self, processor, samples)
        return made | {"labels": torch.full_like(made["labels"], IGNORED)}

    monkeypatch.setattr(Llava, "training_batch", without_labels)
    with pytest.raises(TrainingError, match="step 1: loss is nan"):
        training().finetune(ADAPTER, base, rows(), tmp_path / "out", 0, CPU)
