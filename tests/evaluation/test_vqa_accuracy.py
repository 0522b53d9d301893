"""VQA accuracy against its definition written out, and the four rules where they differ."""

import itertools
from collections.abc import Sequence

import pytest

from evaluation.errors import DataError, RuleError
from evaluation.metrics.vqa_accuracy import Rule, vqa_accuracy


def by_definition(answer: str, references: Sequence[str]) -> float:
    """Leave each annotator out in turn, as the evaluator's loop does."""
    accuracies = []
    for left_out in range(len(references)):
        others = [reference for index, reference in enumerate(references) if index != left_out]
        accuracies.append(min(1, sum(other == answer for other in others) / 3))
    return sum(accuracies) / len(accuracies)


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_annotators(matches: int, expected: float) -> None:
    assert vqa_accuracy("red", ["red"] * matches + ["blue"] * (10 - matches)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("rule", Rule)
def test_closed_form_is_the_definition_for_any_number_of_annotators(rule: str) -> None:
    for annotators, matches in itertools.product(range(1, 13), range(13)):
        if matches <= annotators:
            references = ["x"] * matches + [f"y{index}" for index in range(annotators - matches)]
            assert vqa_accuracy("x", references, rule) == pytest.approx(by_definition("x", references), abs=1e-15)


def test_a_tie_between_two_answers_gives_both_full_credit() -> None:
    references = ["red"] * 5 + ["blue"] * 5
    assert vqa_accuracy("red", references) == vqa_accuracy("blue", references) == 1.0


@pytest.mark.parametrize(
    ("prediction", "references", "normalise_both", "official", "before_2021", "textvqa"),
    [
        # All references equal: the official rule compares as they stand, the old one normalises the prediction alone.
        ("Yes", ["yes"] * 10, 1.0, 0.0, 1.0, 1.0),
        ("yes.", ["yes"] * 10, 1.0, 0.0, 1.0, 1.0),
        ("yes", ["Yes"] * 10, 1.0, 0.0, 0.0, 1.0),
        ("yes\n", ["yes"] * 10, 1.0, 1.0, 1.0, 1.0),
        ("A", ["A"] * 10, 1.0, 1.0, 0.0, 1.0),
        # One annotator differs: all rules normalise, the old one not the references' case, articles and words.
        ("Yes.", ["yes"] * 9 + ["no"], 1.0, 1.0, 1.0, 1.0),
        ("cat", ["the cat"] * 9 + ["dog"], 1.0, 1.0, 0.0, 1.0),
        ("2", ["two"] * 3 + ["2"] * 7, 1.0, 1.0, 1.0, 1.0),
        ("two", ["two"] * 9 + ["3"], 1.0, 1.0, 0.0, 1.0),
        ("red,blue", ["red, blue"] * 9 + ["x"], 1.0, 1.0, 1.0, 0.0),
        ("Macy's", ["macy 's"] * 9 + ["x"], 0.0, 0.0, 0.0, 1.0),
        ("none", ["0"] + ["x"] * 9, 0.3, 0.3, 0.3, 0.3),
    ],
)
def test_rules(
    prediction: str,
    references: list[str],
    normalise_both: float,
    official: float,
    before_2021: float,
    textvqa: float,
) -> None:
    scores = {rule: vqa_accuracy(prediction, references, rule) for rule in Rule}
    expected = dict(zip(Rule, (normalise_both, official, before_2021, textvqa), strict=True))
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("prediction", ["", " \n\t"])
def test_an_empty_prediction_is_wrong_even_where_references_normalise_to_nothing(rule: str, prediction: str) -> None:
    assert vqa_accuracy(prediction, ["the"] * 5 + ["a"] * 5, rule) == 0.0


def test_references_are_not_modified() -> None:
    references = ["The cat", "Dog."]
    vqa_accuracy("cat", references)
    assert references == ["The cat", "Dog."]


def test_no_reference_and_unknown_rule_are_errors() -> None:
    with pytest.raises(DataError, match="no reference answer"):
        vqa_accuracy("yes", [])
    with pytest.raises(RuleError, match=r"'lenient'.*known: normalise_both, official, before_2021, textvqa"):
        vqa_accuracy("yes", ["yes"], "lenient")
