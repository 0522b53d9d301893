"""Samples that stand for the old tasks, for methods that see such: whose they are, and drawing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluation.benchmarks.contract import Benchmark
from experiments.data import BenchmarkData, Rows, identity, module_of, training_samples
from experiments.errors import ConfigError
from experiments.models.adapter import Sample
from experiments.stages.calibrate import Calibration, draw

SUITE = "suite"


@dataclass(frozen=True)
class Source:
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
        """The code that makes the samples."""
        return [__name__, module_of(self.benchmark), module_of(self.rows)]


def sources(calibration: Calibration, suite: Sequence[BenchmarkData]) -> list[Source]:
    """Where the samples to retain come from. Raises ConfigError if the setting is unknown or a benchmark can't help."""
    if calibration.retain == SUITE:
        return _of_suite(suite, calibration.retain_samples)
    raise ConfigError(
        f"calibration.retain={calibration.retain!r}: unknown; choose {SUITE}, the pretrained benchmarks' training rows"
    )


def _of_suite(suite: Sequence[BenchmarkData], count: int) -> list[Source]:
    """``count`` samples, as evenly over the benchmarks as it goes. Training rows that several share are one source."""
    if count < len(suite):
        raise ConfigError(
            f"calibration.retain_samples={count}: less than one for each of the {len(suite)} pretrained benchmarks"
        )
    scored = [identity(data.rows) for data in suite]
    shared: dict[str, Source] = {}
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
        known = shared.get(reading, Source((), data.benchmark, data.train, 0))
        shared[reading] = replace(known, names=(*known.names, data.name), count=known.count + share)
    return list(shared.values())
