"""Where a benchmark's rows come from, and a target task: what it trains on and what it is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from PIL.Image import Image

from evaluation.benchmarks.captions import Captions
from evaluation.benchmarks.contract import Benchmark
from evaluation.metrics.ptb import find_java
from evaluation.prompts import Instruction, instruction
from evaluation.records import Example
from experiments.errors import ConfigError
from experiments.models.adapter import Sample

if TYPE_CHECKING:  # its import takes seconds, and a fusion without samples needs none of it
    from datasets import Dataset


class Rows(Protocol):
    """A frozen value that says where rows are; ``load`` reads them."""

    def load(self) -> Dataset: ...


@dataclass(frozen=True)
class BenchmarkData:
    """A benchmark, the rows it is scored on, and others of the same kind to train on, None where there are none."""

    benchmark: Benchmark
    rows: Rows
    train: Rows | None = None

    @property
    def name(self) -> str:
        return self.benchmark.name

    def instruction(self, prompt_style: str) -> Instruction:
        return instruction(prompt_style, self.benchmark.kind)

    def examples(self, prompt_style: str) -> list[Example]:
        asked = self.instruction(prompt_style)
        return [self.benchmark.example(row, asked) for row in self.rows.load()]

    def identity(self) -> dict[str, Any]:
        """What the scored rows and their reading depend on, for artifact keys and as a score's data revision."""
        return {"benchmark": identity(self.benchmark), "rows": identity(self.rows)}


@dataclass(frozen=True)
class Task:
    """A target: ``test`` is scored, ``train`` is learnt and calibrated on, ``dev`` chooses and holds out tokens."""

    test: BenchmarkData
    train: Rows
    dev: Rows

    @property
    def name(self) -> str:
        return self.test.name

    def samples(self, rows: Rows, prompt_style: str) -> list[list[Sample]]:
        """Of ``rows``, which are this target's, the training samples: see `training_samples`."""
        return training_samples(self.test.benchmark, rows, prompt_style)

    def identity(self) -> dict[str, Any]:
        return {"benchmark": identity(self.test.benchmark), "train": identity(self.train), "dev": identity(self.dev)}


def training_samples(benchmark: Benchmark, rows: Rows, prompt_style: str) -> list[list[Sample]]:
    """For every row its training samples, one an answer worth learning."""
    return [
        [Sample(cast(Image, example.image), example.prompt, answer) for answer in benchmark.answers(example)]
        for example in BenchmarkData(benchmark, rows).examples(prompt_style)
    ]


def identity(value: Any) -> dict[str, Any]:
    """A frozen dataclass as its type and fields, all JSON."""
    return {"type": f"{type(value).__module__}.{type(value).__qualname__}"} | asdict(value)


def module_of(value: Any) -> str:
    """The module that a value's type, or the type itself, is defined in."""
    return (value if isinstance(value, type) else type(value)).__module__


def check_suite(suite: Sequence[BenchmarkData], *tasks: Task) -> None:
    """Before any stage: raises ConfigError if two benchmarks share a name, or a target counts as pretrained, and
    MissingJava if captions are to be scored and there is no Java."""
    scored = [*suite, *(task.test for task in tasks)]
    names = [data.name for data in scored]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"suite: {', '.join(doubled)} stands twice among pretrained benchmarks and targets")
    if any(isinstance(data.benchmark, Captions) for data in scored):
        find_java()
