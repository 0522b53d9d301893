"""Scenes of real handwritten digits: two to three coloured digits on a 2 × 2 grid in a 32 × 32 RGB image.

The digits are the 1,797 of the UCI optical recognition set that ships inside scikit-learn. The first 1,400 appear in
training scenes only, the others in test scenes only, so a test image never shows a stroke that training has seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (235, 45, 45),
    "green": (40, 200, 60),
    "blue": (70, 100, 255),
    "yellow": (240, 220, 40),
    "pink": (245, 95, 220),
    "white": (245, 245, 245),
}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
IMAGE_SIZE = 32
CELL_SIZE = IMAGE_SIZE // 2
GLYPH_SIZE = 12
TRAINING_DIGITS = 1400

Split = Literal["train", "dev", "test"]
Domain = Literal["studio", "street"]
"""The ground that the digits stand on: dark grey in the studio, of any dim colour in the street."""


@dataclass(frozen=True)
class Item:
    """One digit of a scene: its value 0 to 9, colour name and index of its cell in reading order."""

    digit: int
    colour: str
    cell: int

    @property
    def word(self) -> str:
        return DIGITS[self.digit]

    @property
    def place(self) -> str:
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class Scene:
    """What a picture shows: its items in reading order and the domain it is drawn in."""

    items: tuple[Item, ...]
    domain: Domain


def generator(*key: object) -> np.random.Generator:
    """A random generator that depends on ``key`` alone, so the order in which data sets are made never matters."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def is_novel(digit: int, colour: str) -> bool:
    """Whether this pair of digit and colour (one in five) is kept out of every pretraining caption, as NoCaps does."""
    return (digit + 2 * list(COLOURS).index(colour)) % 5 == 0


PAIRS = tuple((digit, colour) for digit in range(10) for colour in COLOURS)
FAMILIAR = tuple(pair for pair in PAIRS if not is_novel(*pair))
NOVEL = tuple(pair for pair in PAIRS if is_novel(*pair))


def sample_scene(rng: np.random.Generator, domain: Domain = "studio", novelty: str = "any") -> Scene:
    """Draws a scene of two or three items with distinct digits and distinct colours.

    ``novelty``: ``none`` (familiar pairs alone, NoCaps "in"), ``some`` (exactly one novel pair, "near"), ``all``
    (novel pairs alone, "out") or ``any``.
    """
    pools = {
        "none": lambda count: [FAMILIAR] * count,
        "some": lambda count: [NOVEL] + [FAMILIAR] * (count - 1),
        "all": lambda count: [NOVEL] * count,
        "any": lambda count: [PAIRS] * count,
    }
    count = int(rng.integers(2, 4))
    while True:
        pairs = [pool[rng.integers(len(pool))] for pool in pools[novelty](count)]
        if len({digit for digit, _ in pairs}) == count == len({colour for _, colour in pairs}):
            break
    cells = rng.permutation(4)[:count]
    items = (Item(digit, colour, int(cell)) for (digit, colour), cell in zip(pairs, cells, strict=True))
    return Scene(tuple(sorted(items, key=lambda item: item.cell)), domain)


def render(scene: Scene, rng: np.random.Generator, split: Split) -> Image.Image:
    """Draws ``scene`` with handwriting of ``split`` (development scenes use training handwriting)."""
    ground = np.full(3, rng.uniform(0, 50)) if scene.domain == "studio" else rng.uniform(20, 90, size=3)
    canvas = np.tile(ground, (IMAGE_SIZE, IMAGE_SIZE, 1))
    for item in scene.items:
        glyphs = _glyphs("test" if split == "test" else "train")[item.digit]
        ink = glyphs[rng.integers(len(glyphs))][..., None]
        row, column = rng.integers(1, 4, size=2) + CELL_SIZE * np.array(divmod(item.cell, 2))
        window = canvas[row : row + GLYPH_SIZE, column : column + GLYPH_SIZE]
        window += ink * (np.array(COLOURS[item.colour]) - window)
    noise = rng.normal(0, 4, size=canvas.shape)
    return Image.fromarray(np.clip(canvas + noise, 0, 255).astype(np.uint8))


@cache
def _glyphs(split: Literal["train", "test"]) -> dict[int, np.ndarray]:
    """Ink coverage in [0, 1] by digit: (count, GLYPH_SIZE, GLYPH_SIZE) float64."""
    from sklearn.datasets import load_digits

    data = load_digits()
    part = slice(None, TRAINING_DIGITS) if split == "train" else slice(TRAINING_DIGITS, None)
    images, labels = data.images[part], data.target[part]

    def enlarge(image: np.ndarray) -> np.ndarray:
        bitmap = Image.fromarray((image / 16 * 255).astype(np.uint8))
        return np.asarray(bitmap.resize((GLYPH_SIZE, GLYPH_SIZE), Image.Resampling.BILINEAR)) / 255

    return {digit: np.stack([enlarge(image) for image in images[labels == digit]]) for digit in range(10)}
