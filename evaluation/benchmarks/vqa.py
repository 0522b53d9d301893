"""Visual questions answered by several annotators, scored by VQA accuracy: VQAv2, OKVQA, VizWiz, TextVQA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from evaluation.benchmarks.contract import Outcome
from evaluation.benchmarks.rows import Row
from evaluation.errors import DataError
from evaluation.metrics.vqa_accuracy import Rule, parse_rule, vqa_accuracy
from evaluation.prompts import Instruction
from evaluation.records import Example


@dataclass(frozen=True)
class VQA:
    """The answers column holds texts or mappings with a text "answer", `annotators` of them (None: any number).

    `group_column` names a column (VQAv2: answer_type) whose values are scored apart as well. Raises RuleError for an
    unknown rule.
    """

    name: str
    kind: str = "short_answer"
    rule: str = Rule.NORMALISE_BOTH
    annotators: int | None = 10
    id_column: str = "question_id"
    image_column: str = "image"
    question_column: str = "question"
    answers_column: str = "answers"
    group_column: str | None = None

    def __post_init__(self) -> None:
        parse_rule(self.rule)

    def example(self, row: Mapping[str, object], instruction: Instruction) -> Example:
        columns = (self.id_column, self.image_column, self.question_column, self.answers_column)
        read = Row(self.name, row, columns if self.group_column is None else (*columns, self.group_column))
        example = Example(
            id=read.identifier(self.id_column),
            prompt=instruction.render(question=read.text(self.question_column)),
            references=read.texts(self.answers_column, key="answer"),
            image=read.image(self.image_column),
            group="" if self.group_column is None else read.text(self.group_column),
        )
        if self.annotators is not None and len(example.references) != self.annotators:
            raise DataError(
                f"{self.name}: question {example.id} has {len(example.references)} answers in column "
                f"{self.answers_column}, expected {self.annotators}; VQA accuracy depends on their number: check the "
                "data or set the benchmark's annotators"
            )
        return example

    def answers(self, example: Example) -> tuple[str, ...]:
        """The answer that most annotators gave; of equals, the one given first."""
        return (Counter(example.references).most_common(1)[0][0],)

    def score(self, examples: Sequence[Example], texts: Mapping[str, str]) -> Outcome:
        scores = {each.id: 100 * vqa_accuracy(texts[each.id], each.references, self.rule) for each in examples}
        return Outcome(
            metric="VQA accuracy",
            rule=str(parse_rule(self.rule)),
            value=fmean(scores.values()),
            per_example=scores,
        )
