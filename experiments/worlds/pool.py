"""Training scenes of the embedded world as tensors, and the turns of conversation that pretraining draws from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.prompts import instruction
from experiments.worlds.captions import Style, caption
from experiments.worlds.questions import PRETRAINED_SKILLS, SKILLS
from experiments.worlds.scenes import COLOURS, Scene, generator, is_novel, render, sample_scene

STREET_SCENES = 0.3
CAPTION_PROMPT = instruction("digits_llava", "caption").template
EMPTY_DIGIT, EMPTY_COLOUR = 10, len(COLOURS)


@dataclass(frozen=True)
class ScenePool:
    """Training scenes with their pixels as the model's image processor makes them.

    pixels: (count, 3, size, size) float32; digits, colours: (count, 4) int64 by cell, EMPTY_* where a cell is empty.
    """

    scenes: tuple[Scene, ...]
    pixels: Tensor
    digits: Tensor
    colours: Tensor

    def __len__(self) -> int:
        return len(self.scenes)


def scene_pool(image_processor: Any, count: int) -> ScenePool:
    rng = generator("pretraining", "train")
    scenes = [sample_scene(rng, "street" if rng.random() < STREET_SCENES else "studio") for _ in range(count)]
    images = [render(scene, rng, "train") for scene in scenes]
    digits = torch.full((count, 4), EMPTY_DIGIT)
    colours = torch.full((count, 4), EMPTY_COLOUR)
    for row, scene in enumerate(scenes):
        for item in scene.items:
            digits[row, item.cell] = item.digit
            colours[row, item.cell] = list(COLOURS).index(item.colour)
    pixels = image_processor(images=images, return_tensors="pt")["pixel_values"]
    return ScenePool(tuple(scenes), pixels, digits, colours)


def turns(scene: Scene, rng: np.random.Generator, street_captions: float = 0.0) -> list[tuple[str, str]]:
    """A caption, where every pair is familiar, and a question of every pretrained skill: (prompt, answer) pairs.

    ``street_captions`` is the share of captions that are in the target's style, whatever the scene.
    """
    asked = [skill.ask(scene, rng) for skill in PRETRAINED_SKILLS.values()]
    pairs = [(question.text, question.answer) for question in asked]
    if any(is_novel(item.digit, item.colour) for item in scene.items):
        return pairs
    style: Style = "street" if rng.random() < street_captions else "everyday"
    return [(CAPTION_PROMPT, caption(scene, style, rng)), *pairs]


def turn(scene: Scene, rng: np.random.Generator, street_captions: float = 0.0) -> tuple[str, str]:
    """One of the scene's `turns`: of those with a caption at least every fourth is that."""
    pairs = turns(scene, rng, street_captions)
    if pairs[0][0] == CAPTION_PROMPT and rng.random() < 0.25:
        return pairs[0]
    return pairs[rng.integers(len(pairs))]


def vocabulary() -> list[str]:
    """Every word of the world's questions, answers, captions and prompts, sorted."""
    rng = generator("vocabulary")
    texts = [CAPTION_PROMPT, *(answer for skill in SKILLS.values() for answer in skill.answers)]
    for _ in range(200):
        scene = sample_scene(rng)
        texts += [skill.ask(scene, rng).text for skill in SKILLS.values()]
        texts += [caption(scene, "everyday", rng), caption(scene, "street", rng)]
    return sorted({word for text in texts for word in text.split()})
