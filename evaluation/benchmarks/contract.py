"""What a benchmark family is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from evaluation.prompts import Instruction
from evaluation.records import Example, ExampleScores


@dataclass(frozen=True)
class Outcome:
    """What a benchmark makes of one text an example: `value` and `per_example` both scaled by 100."""

    metric: str
    rule: str
    value: float
    per_example: ExampleScores


class Benchmark(Protocol):
    """A frozen value whose fields say where a row keeps what; it loads no data and runs no model."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """The kind of instruction that it needs, see `evaluation.prompts.instruction`."""
        ...

    def example(self, row: Mapping[str, object], instruction: Instruction) -> Example:
        """The example of a data row. Raises DataError if the row is not as expected."""
        ...

    def answers(self, example: Example) -> tuple[str, ...]:
        """The texts that a model fine-tuned on this example learns, one training sample each."""
        ...

    def score(self, examples: Sequence[Example], texts: Mapping[str, str]) -> Outcome:
        """Score one generated text an example, by id; `evaluation.score.score_predictions` has checked the ids."""
        ...
