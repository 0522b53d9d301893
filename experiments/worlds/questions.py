"""Questions about a scene by skill, with ten annotators of whom a seeded minority deviates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from experiments.worlds.scenes import COLOURS, DIGITS, POSITIONS, Item, Scene

ANNOTATORS = 10
MAX_DEVIATING = 3


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """A kind of question: how to ask it of a scene, and the answers that annotators of it may give."""

    ask: Callable[[Scene, np.random.Generator], Question]
    answers: tuple[str, ...]


FRUITS = {"red": "cherry", "green": "lime", "blue": "plum", "yellow": "banana", "pink": "peach", "white": "coconut"}


def _any_item(scene: Scene, rng: np.random.Generator) -> Item:
    return scene.items[rng.integers(len(scene.items))]


def _colour(scene: Scene, rng: np.random.Generator) -> Question:
    item = _any_item(scene, rng)
    return Question(f"what colour is {item.place} ?", item.colour)


def _digit(scene: Scene, rng: np.random.Generator) -> Question:
    item = _any_item(scene, rng)
    return Question(f"which number is {item.place} ?", item.word)


def _where(scene: Scene, rng: np.random.Generator) -> Question:
    item = _any_item(scene, rng)
    return Question(f"where is {item.colour} ?", item.place)


def _parity(scene: Scene, rng: np.random.Generator) -> Question:
    item = _any_item(scene, rng)
    return Question(f"is {item.place} even or odd ?", "odd" if item.digit % 2 else "even")


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("how many numbers ?", DIGITS[len(scene.items)])


def _larger(scene: Scene, rng: np.random.Generator) -> Question:
    item = _any_item(scene, rng)
    return Question(f"is {item.place} larger than four ?", "yes" if item.digit > 4 else "no")


def _occupied(scene: Scene, rng: np.random.Generator) -> Question:
    cell = int(rng.integers(4))
    present = any(item.cell == cell for item in scene.items)
    return Question(f"is there a {POSITIONS[cell]} number ?", "yes" if present else "no")


def _opposite(scene: Scene, rng: np.random.Generator) -> Question:
    item = _any_item(scene, rng)
    return Question(f"what colour is opposite {POSITIONS[3 - item.cell]} ?", item.colour)


def _fruit(scene: Scene, rng: np.random.Generator) -> Question:
    item = _any_item(scene, rng)
    return Question(f"which fruit has the colour of {item.place} ?", FRUITS[item.colour])


PRETRAINED_SKILLS = {
    "colour": Skill(_colour, tuple(COLOURS)),
    "digit": Skill(_digit, DIGITS),
    "where": Skill(_where, POSITIONS),
    "parity": Skill(_parity, ("even", "odd")),
    "larger": Skill(_larger, ("yes", "no")),
    "occupied": Skill(_occupied, ("yes", "no")),
    "count": Skill(_count, ("two", "three")),
}
TARGET_SKILLS = {
    # Reasoning over a relation that pretraining never asked for (GQA's part).
    "opposite": Skill(_opposite, tuple(COLOURS)),
    # Knowledge that is not in the picture (OKVQA's part).
    "fruit": Skill(_fruit, tuple(FRUITS.values())),
}
SKILLS = PRETRAINED_SKILLS | TARGET_SKILLS


def annotate(skill: Skill, answer: str, rng: np.random.Generator) -> list[str]:
    """Ten answers, of which zero to three are another of the skill's answers, in random order."""
    others = [other for other in skill.answers if other != answer]
    deviating = int(rng.integers(MAX_DEVIATING + 1))
    answers = [answer] * (ANNOTATORS - deviating) + [str(rng.choice(others)) for _ in range(deviating)]
    return [answers[index] for index in rng.permutation(ANNOTATORS)]
