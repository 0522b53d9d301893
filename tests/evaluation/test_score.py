"""score_predictions: what a score says, and the predictions that it refuses."""

from dataclasses import replace

import pytest

from evaluation.benchmarks.gqa import GQA
from evaluation.benchmarks.vqa import VQA
from evaluation.errors import DataError, PredictionError
from evaluation.prompts import instruction
from evaluation.records import Prediction, Score
from evaluation.score import score_predictions

BENCHMARK = GQA("gqa")
INSTRUCTION = instruction("instructblip", "short_answer")
EXAMPLES = [
    BENCHMARK.example(
        {"id": str(number), "image": object(), "question": f"How many, {number}?", "answer": "two"}, INSTRUCTION
    )
    for number in range(4)
]
PREDICTIONS = [
    Prediction(example.id, example.prompt, text)
    for example, text in zip(EXAMPLES, ("two", "Two.", "2", " "), strict=True)
]


def test_a_score_carries_all_that_it_was_made_with() -> None:
    score, per_example = score_predictions(BENCHMARK, EXAMPLES, PREDICTIONS, INSTRUCTION, data="testdev@abc")
    assert per_example == {"0": 100.0, "1": 100.0, "2": 0.0, "3": 0.0}
    assert score == Score(
        benchmark="gqa",
        metric="accuracy",
        rule="exact match, lower case, no final period",
        value=50.0,
        count=4,
        prompt="Question: {question} Short answer:",
        generation={
            "num_beams": 5,
            "max_new_tokens": 10,
            "min_new_tokens": 1,
            "length_penalty": -1.0,
            "repetition_penalty": 1.5,
        },
        data="testdev@abc",
        details={"empty": 1},
    )


def test_order_of_predictions_does_not_matter() -> None:
    forward = score_predictions(BENCHMARK, EXAMPLES, PREDICTIONS, INSTRUCTION, "x")
    assert score_predictions(BENCHMARK, EXAMPLES, PREDICTIONS[::-1], INSTRUCTION, "x") == forward


def test_an_empty_answer_counts_as_wrong_even_where_nothing_is_right() -> None:
    benchmark = VQA("letters")
    row = {"question_id": 1, "image": object(), "question": "Which letter?", "answers": ["A"] * 10}
    example = benchmark.example(row, INSTRUCTION)
    score, _ = score_predictions(benchmark, [example], [Prediction("1", example.prompt, "")], INSTRUCTION, "x")
    assert (score.value, score.details) == (0.0, {"empty": 1})


def test_groups_are_reported_apart() -> None:
    examples = [replace(each, group=group) for each, group in zip(EXAMPLES, ("n", "n", "n", ""), strict=True)]
    score, _ = score_predictions(BENCHMARK, examples, PREDICTIONS, INSTRUCTION, "x")
    assert score.details == {"empty": 1, "group/n": pytest.approx(200 / 3)}


@pytest.mark.parametrize(
    ("predictions", "finding"),
    [
        (PREDICTIONS[1:], r"1 missing \(0\)"),
        ([], r"4 missing \(0, 1, 2, 3\)"),
        ([*PREDICTIONS, PREDICTIONS[2]], r"1 doubled \(2\)"),
        ([*PREDICTIONS, replace(PREDICTIONS[0], id="9")], r"1 foreign \(9\)"),
        ([replace(PREDICTIONS[0], id="9"), *PREDICTIONS[1:]], r"1 missing \(0\), 1 foreign \(9\)"),
    ],
)
def test_ids_must_be_those_of_the_examples(predictions: list[Prediction], finding: str) -> None:
    with pytest.raises(PredictionError, match=rf"gqa: of 4 expected predictions, {finding}"):
        score_predictions(BENCHMARK, EXAMPLES, predictions, INSTRUCTION, "x")


def test_predictions_of_another_prompt_are_refused() -> None:
    other = [*PREDICTIONS[:3], replace(PREDICTIONS[3], prompt="How many?")]
    with pytest.raises(PredictionError, match="gqa: 1 of 4 predictions were made with another prompt; 3 had 'How many"):
        score_predictions(BENCHMARK, EXAMPLES, other, INSTRUCTION, "x")


def test_examples_must_exist_and_have_ids_of_their_own() -> None:
    with pytest.raises(DataError, match="gqa: no example to score"):
        score_predictions(BENCHMARK, [], [], INSTRUCTION, "x")
    with pytest.raises(DataError, match="gqa: 1 ids name more than one example, the first is 0"):
        score_predictions(BENCHMARK, [*EXAMPLES, EXAMPLES[0]], PREDICTIONS, INSTRUCTION, "x")
