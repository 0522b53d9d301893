"""Samples that stand for the old tasks, for methods that see such: whose they are, and drawing them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from evaluation.benchmarks.contract import Benchmark
from experiments.data import BenchmarkData, Rows, identity, module_of, training_samples
from experiments.errors import ConfigError
from experiments.models.adapter import Sample
from experiments.samples import draw_lines, read_lines
from experiments.stages.calibrate import Calibration, draw

SUITE = "suite"


class SampleSource(Protocol):
    """Where some of the samples come from."""

    def samples(self, seed: int, prompt_style: str) -> list[Sample]: ...

    def identity(self) -> dict[str, Any]:
        """What the samples depend on, besides the seed."""
        ...

    def modules(self) -> list[str]:
        """The code that makes the samples."""
        ...


@dataclass(frozen=True)
class FileSamples:
    """So many samples of a JSON Lines file."""

    path: Path
    count: int

    def samples(self, seed: int, prompt_style: str) -> list[Sample]:
        """Raises SampleError for a file, a line or an image that can't be read."""
        return draw_lines(self.path, self.count, 0, seed)[0]

    def identity(self) -> dict[str, Any]:
        lines = read_lines(self.path)
        images = [hashlib.sha256(line.image.read_bytes()).hexdigest() for line in lines if line.image is not None]
        content = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {"content": content, "images": images, "count": self.count}

    def modules(self) -> list[str]:
        return [draw_lines.__module__]


@dataclass(frozen=True)
class RowSamples:
    """So many samples of some training rows. ``names``: the benchmarks whose training rows these are."""

    names: tuple[str, ...]
    benchmark: Benchmark
    rows: Rows
    count: int

    def samples(self, seed: int, prompt_style: str) -> list[Sample]:
        """Raises ConfigError if there are too few rows."""
        found = training_samples(self.benchmark, self.rows, prompt_style)
        return draw(found, self.count, seed, f"calibration.retain_samples, of which {', '.join(self.names)}")

    def identity(self) -> dict[str, Any]:
        return {"benchmark": identity(self.benchmark), "rows": identity(self.rows), "count": self.count}

    def modules(self) -> list[str]:
        return [__name__, module_of(self.benchmark), module_of(self.rows)]


def sources(calibration: Calibration, suite: Sequence[BenchmarkData]) -> list[SampleSource]:
    """Where the samples to retain come from. Raises ConfigError if the setting is unknown or a benchmark can't help."""
    if calibration.retain == SUITE:
        return [*_of_suite(suite, calibration.retain_samples)]
    if Path(calibration.retain).is_file():
        return [FileSamples(Path(calibration.retain), calibration.retain_samples)]
    raise ConfigError(
        f"calibration.retain={calibration.retain!r}: is neither a JSON Lines file nor {SUITE}, the pretrained "
        "benchmarks' training rows"
    )


def _of_suite(suite: Sequence[BenchmarkData], count: int) -> list[RowSamples]:
    """``count`` samples, as evenly over the benchmarks as it goes. Training rows that several share are one source."""
    if count < len(suite):
        raise ConfigError(
            f"calibration.retain_samples={count}: less than one for each of the {len(suite)} pretrained benchmarks"
        )
    scored = [identity(data.rows) for data in suite]
    shared: dict[str, RowSamples] = {}
    for number, data in enumerate(suite):
        if data.train is None:
            raise ConfigError(
                f"calibration.retain={SUITE}: {data.name} has no training rows; state them as `train` in its "
                "conf/benchmark file, or choose a suite whose benchmarks all have some"
            )
        if identity(data.train) in scored:
            raise ConfigError(
                f"calibration.retain={SUITE}: the training rows of {data.name} are scored; give those of another split"
            )
        share = count // len(suite) + (number < count % len(suite))
        reading = json.dumps([identity(data.benchmark) | {"name": ""}, identity(data.train)])
        known = shared.get(reading, RowSamples((), data.benchmark, data.train, 0))
        shared[reading] = replace(known, names=(*known.names, data.name), count=known.count + share)
    return list(shared.values())
