"""Visual questions with one right answer, scored by exact match: GQA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from evaluation.benchmarks.contract import Outcome
from evaluation.benchmarks.rows import Row
from evaluation.metrics.exact_match import exact_match
from evaluation.prompts import Instruction
from evaluation.records import Example


@dataclass(frozen=True)
class GQA:
    """GQA's two tables, instructions and images, come joined: a row has the image itself."""

    name: str
    kind: str = "short_answer"
    id_column: str = "id"
    image_column: str = "image"
    question_column: str = "question"
    answer_column: str = "answer"

    def example(self, row: Mapping[str, object], instruction: Instruction) -> Example:
        read = Row(self.name, row, (self.id_column, self.image_column, self.question_column, self.answer_column))
        return Example(
            id=read.identifier(self.id_column),
            prompt=instruction.render(question=read.text(self.question_column)),
            references=(read.text(self.answer_column),),
            image=read.image(self.image_column),
        )

    def answers(self, example: Example) -> tuple[str, ...]:
        return example.references

    def score(self, examples: Sequence[Example], texts: Mapping[str, str]) -> Outcome:
        scores = {each.id: 100.0 * exact_match(texts[each.id], each.references[0]) for each in examples}
        return Outcome(
            metric="accuracy",
            rule="exact match, lower case, no final period",
            value=fmean(scores.values()),
            per_example=scores,
        )
