"""Samples from a JSON Lines file: ``{"image": "a.jpg", "prompt": "…", "answer": "…"}`` or ``{"text": "…"}`` a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from PIL import Image, UnidentifiedImageError

from experiments import checks
from experiments.data import Rows
from experiments.errors import ConfigError, SampleError
from experiments.models.adapter import Adapter, Sample
from experiments.schema import instantiate_group
from experiments.stages.calibrate import INPUTS, draw

FIELDS = ("image", "prompt", "answer", "text")


@dataclass(frozen=True)
class SampleCalibration:
    """What two given checkpoints are calibrated on: a value of `conf/calibration/samples.yaml`.

    ``data`` and ``retain`` are JSON Lines files or names of tasks; ``memory_gb`` is in 10⁹ bytes.
    """

    data: str | Sequence[str] | None
    retain: str | None
    samples: int
    held_out: int
    batch_size: int
    inputs: str
    memory_gb: float
    damping: float
    compare_decorators: bool

    def __post_init__(self) -> None:
        checks.whole(self, "samples", "batch_size")
        checks.whole(self, "held_out", least=0)
        checks.one_of(self, "inputs", INPUTS)
        checks.real(self, "memory_gb", above=True)
        checks.real(self, "damping")
        checks.boolean(self, "compare_decorators")


@dataclass(frozen=True)
class Line:
    """A line of the file, its image not read yet. ``place`` is for messages."""

    place: str
    image: Path | None
    prompt: str | None
    answer: str | None

    def sample(self) -> Sample:
        """Reads the image. Raises SampleError."""
        if self.image is None:
            return Sample(None, self.prompt, self.answer)
        try:
            with Image.open(self.image) as image:
                return Sample(image.convert("RGB"), self.prompt, self.answer)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise SampleError(f"{self.place}: {self.image} is no readable image ({error}); replace it") from error


def read_lines(path: Path) -> list[Line]:
    """All lines, checked. Image paths count from the file's folder.

    An image or a prompt makes a turn of conversation, of which ``answer`` is the reply; ``text`` stands alone. Raises
    SampleError naming the first bad line.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SampleError(f"{path}: cannot be read ({error}); give a JSON Lines file in UTF-8") from error
    lines = [
        _line(f"{path}:{number}", text, path.parent)
        for number, text in enumerate(content.split("\n"), start=1)
        if text.strip()
    ]
    if not lines:
        raise SampleError(f"{path}: holds no sample; give one JSON object a line")
    return lines


def draw_lines(path: Path, count: int, held_out: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """``count`` lines of the file at random, or all if there are fewer, and ``held_out`` others.

    Raises ConfigError if none remain to calibrate on, and SampleError for a bad line or an unreadable image.
    """
    lines = read_lines(path)
    if held_out >= len(lines):
        raise ConfigError(f"calibration.held_out={held_out}: {path} has {len(lines)} samples in all; ask for fewer")
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
    held, rest = order[:held_out], order[held_out:]
    return [lines[index].sample() for index in rest[:count]], [lines[index].sample() for index in held]


def drawn(
    data: str, count: int, held_out: int, seed: int, adapter: Adapter, setting: str
) -> tuple[list[Sample], list[Sample]]:
    """Samples to calibrate on and to hold out: of a JSON Lines file, or of a configured task's training and dev rows.

    Raises ConfigError naming ``setting`` if ``data`` is neither.
    """
    path = Path(data)
    if path.is_file():
        return draw_lines(path, count, held_out, seed)
    try:
        task = compose(f"task/{data}").task
    except MissingConfigException as error:
        raise ConfigError(f"{setting}={data}: is neither a file nor a task of conf/task") from error
    parts = instantiate_group("task", OmegaConf.to_container(task, resolve=True))

    def some(rows: Rows, most: int, name: str) -> list[Sample]:
        found = parts.samples(rows, adapter.prompt_style)
        return draw(found, min(most, len(found)), seed, name)

    samples = some(parts.train, count, "calibration.samples")
    return samples, some(parts.dev, held_out, "calibration.held_out") if held_out else []


def _line(place: str, text: str, folder: Path) -> Line:
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise SampleError(f"{place}: not JSON ({error}); write one object a line") from error
    if not isinstance(entry, dict):
        raise SampleError(f"{place}: not an object; its fields are {', '.join(FIELDS)}")
    entry = {name: value for name, value in entry.items() if value is not None}
    if not all(isinstance(value, str) for value in entry.values()):
        raise SampleError(f"{place}: holds something else than texts; its fields are {', '.join(FIELDS)}")
    if unknown := sorted(entry.keys() - set(FIELDS)):
        raise SampleError(f"{place}: unknown {', '.join(unknown)}; the fields are {', '.join(FIELDS)}")
    if "text" in entry:
        if len(entry) > 1:
            raise SampleError(f"{place}: text stands alone; for a conversation give prompt and answer instead")
        return Line(place, None, None, entry["text"])
    if "prompt" not in entry:
        raise SampleError(f"{place}: has neither prompt nor text; add one")
    image = folder / entry["image"] if "image" in entry else None
    if image is not None and not image.is_file():
        raise SampleError(f"{place}: {image} does not exist; paths count from the folder of the JSON Lines file")
    return Line(place, image, entry["prompt"], entry.get("answer"))
