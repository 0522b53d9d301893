"""From predictions to a score: every example is scored, exactly once, on the prompt it was meant to have."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean

from evaluation.benchmarks.contract import Benchmark
from evaluation.errors import DataError, PredictionError
from evaluation.prompts import Instruction
from evaluation.records import Example, ExampleScores, Prediction, Score, check_ids


def score_predictions(
    benchmark: Benchmark,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    instruction: Instruction,
    data: str,
) -> tuple[Score, ExampleScores]:
    """Score the predictions of all examples, in any order; the second value is each example's score.

    `data` is the revision or fingerprint of the rows. A prediction without text is wrong and is counted in
    `details["empty"]`; groups of examples add their means as `details["group/<name>"]`.

    Raises DataError if there is no example or an id names two; PredictionError if predictions are missing, doubled or
    foreign, or were made with another prompt; and what the benchmark's metric raises.
    """
    if not examples:
        raise DataError(f"{benchmark.name}: no example to score; check the split and the limit on its size")
    if doubled := [each for each, count in Counter(example.id for example in examples).items() if count > 1]:
        raise DataError(f"{benchmark.name}: {len(doubled)} ids name more than one example, the first is {doubled[0]}")
    check_ids((each.id for each in examples), (each.id for each in predictions), benchmark.name)
    by_id = {each.id: each for each in predictions}
    _check_prompts(benchmark.name, examples, by_id)

    outcome = benchmark.score(examples, {example.id: by_id[example.id].text for example in examples})
    score = Score(
        benchmark=benchmark.name,
        metric=outcome.metric,
        rule=outcome.rule,
        value=outcome.value,
        count=len(examples),
        prompt=instruction.template,
        generation=instruction.generation.to_json(),
        data=data,
        details={
            "empty": sum(not each.text.strip() for each in predictions),
            **_group_means(examples, outcome.per_example),
        },
    )
    return score, outcome.per_example


def _check_prompts(place: str, examples: Sequence[Example], by_id: dict[str, Prediction]) -> None:
    differing = [each for each in examples if each.prompt != by_id[each.id].prompt]
    if differing:
        first = differing[0]
        raise PredictionError(
            f"{place}: {len(differing)} of {len(examples)} predictions were made with another prompt; {first.id} had "
            f"{by_id[first.id].prompt!r}, expected {first.prompt!r}; generate them anew or score with their instruction"
        )


def _group_means(examples: Sequence[Example], scores: ExampleScores) -> dict[str, float]:
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for example in examples:
        if example.group:
            groups[example.group].append(scores[example.id])
    return {f"group/{name}": fmean(values) for name, values in sorted(groups.items())}
