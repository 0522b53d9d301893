"""The embedded world's data sets, with the columns of the real ones: captions, annotated questions, single answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import datasets
import PIL.Image
from datasets import Dataset, Features, Value

from experiments import checks
from experiments.worlds.captions import Style, caption, references
from experiments.worlds.questions import SKILLS, annotate
from experiments.worlds.scenes import Domain, Scene, Split, generator, render, sample_scene

NOVELTIES = ("none", "some", "all", "any")


@dataclass(frozen=True)
class CaptionRows:
    """Scenes with five captions (columns image, image_id, captions), as COCO, NoCaps and Flickr30k have them.

    ``novelty`` says how many pairs of digit and colour were never captioned in pretraining: none, some, all or any.
    """

    split: Split
    domain: Domain
    style: Style
    novelty: str
    count: int

    def __post_init__(self) -> None:
        _check_scenes(self)
        checks.one_of(self, "style", get_args(Style))
        checks.one_of(self, "novelty", NOVELTIES)

    def load(self) -> Dataset:
        return _captions(self)


@dataclass(frozen=True)
class QuestionRows:
    """Questions of one skill with ten annotators' answers (question_id, image, question, answers), as VQAv2 has them.

    With ``single_answer`` the columns are GQA's: id, image, question, answer.
    """

    split: Split
    domain: Domain
    skill: str
    count: int
    single_answer: bool

    def __post_init__(self) -> None:
        _check_scenes(self)
        checks.one_of(self, "skill", SKILLS)
        checks.boolean(self, "single_answer")

    def load(self) -> Dataset:
        return _questions(self)


def _check_scenes(rows: CaptionRows | QuestionRows) -> None:
    checks.one_of(rows, "split", get_args(Split))  # a split misspelt must not show training handwriting
    checks.one_of(rows, "domain", get_args(Domain))
    checks.whole(rows, "count")


@dataclass(frozen=True)
class _Captioned:
    id: str
    scene: Scene
    image: PIL.Image.Image
    captions: list[str]


def _captioned(rows: CaptionRows) -> Iterator[_Captioned]:
    rng = generator("captions", rows.split, rows.domain, rows.style, rows.novelty)
    for number in range(rows.count):
        scene = sample_scene(rng, rows.domain, rows.novelty)
        image = render(scene, rng, rows.split)
        yield _Captioned(f"{number:05}", scene, image, references(scene, rows.style, rng))


@cache
def _captions(rows: CaptionRows) -> Dataset:
    features = {"image_id": Value("string"), "image": datasets.Image(), "captions": datasets.List(Value("string"))}
    records = [{"image_id": each.id, "image": each.image, "captions": each.captions} for each in _captioned(rows)]
    return Dataset.from_list(records, features=Features(features))


def sixth_captions(rows: CaptionRows) -> dict[str, str]:
    """By image id, what a sixth annotator writes: what a person would score against the other five."""
    return {each.id: caption(each.scene, rows.style, generator("sixth", each.id)) for each in _captioned(rows)}


@cache
def _questions(rows: QuestionRows) -> Dataset:
    skill = SKILLS[rows.skill]

    def questions() -> Iterator[dict[str, Any]]:
        rng = generator("questions", rows.split, rows.domain, rows.skill)
        for number in range(rows.count):
            scene = sample_scene(rng, rows.domain)
            image = render(scene, rng, rows.split)
            asked = skill.ask(scene, rng)
            row = {"image": image, "question": asked.text}
            if rows.single_answer:
                yield row | {"id": f"{number:05}", "answer": asked.answer}
            else:
                yield row | {"question_id": number, "answers": annotate(skill, asked.answer, rng)}

    features: dict[str, Any] = {"image": datasets.Image(), "question": Value("string")}
    if rows.single_answer:
        features |= {"id": Value("string"), "answer": Value("string")}
    else:
        features |= {"question_id": Value("int64"), "answers": datasets.List(Value("string"))}
    return Dataset.from_list(list(questions()), features=Features(features))
