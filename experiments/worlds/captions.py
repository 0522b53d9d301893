"""How annotators describe a scene: the everyday wording of the pretraining data and the target's own style.

Five people who see one picture hardly agree on a word: some pass over a number, some name no places, each has turns of
phrase of their own, one in five starts from the other end. A caption is scored against such variety, as on COCO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from experiments.worlds.scenes import Item, Scene

Style = Literal["everyday", "street"]
REFERENCES = 5


def caption(scene: Scene, style: Style, rng: np.random.Generator) -> str:
    """One annotator's caption of ``scene``, lower case, words and marks separated by single spaces."""
    return _street(scene.items, rng) if style == "street" else _everyday(scene.items, rng)


def references(scene: Scene, style: Style, rng: np.random.Generator) -> list[str]:
    """Five independent captions of one scene."""
    return [caption(scene, style, rng) for _ in range(REFERENCES)]


def _everyday(items: Sequence[Item], rng: np.random.Generator) -> str:
    opening = _pick(rng, {"": 0.5, "there is ": 0.2, "the picture shows ": 0.15, "we see ": 0.15})
    thing = _pick(rng, {"a {colour} {word}": 0.5, "a {word} in {colour}": 0.3, "the number {word} in {colour}": 0.2})
    place = _pick(rng, {" at the {place}": 0.4, " in the {place} corner": 0.2, " on the {place}": 0.15, "": 0.25})
    return opening + _enumerate(thing + place, _told(items, rng)) + " ."


def _street(items: Sequence[Item], rng: np.random.Generator) -> str:
    count = {2: "two", 3: "three"}[len(items)]
    opening = _pick(rng, {"{count} painted signs : ": 0.4, "signs on a wall : ": 0.3, "look , ": 0.3})
    thing = _pick(rng, {"{word} painted {colour}": 0.5, "{colour} paint for {word}": 0.3, "{word} all {colour}": 0.2})
    place = _pick(rng, {"{place} , ": 0.5, "{place} side , ": 0.2, "": 0.3})
    return opening.format(count=count) + _enumerate(place + thing, _told(items, rng)) + " ."


def _told(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """In reading order, or backwards one time in five; each item is passed over one time in five, but never all."""
    kept = [item for item in items if rng.random() < 0.8] or [items[rng.integers(len(items))]]
    return kept if rng.random() < 0.8 else kept[::-1]


def _enumerate(template: str, items: Sequence[Item]) -> str:
    parts = [template.format(word=item.word, colour=item.colour, place=item.place) for item in items]
    return " and ".join([" , ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _pick(rng: np.random.Generator, weights: dict[str, float]) -> str:
    return str(rng.choice(list(weights), p=list(weights.values())))
