"""Answers and what the official VQA evaluator makes of them, worked out by hand from its source."""

import pytest

from evaluation.normalise import normalise, normalise_punctuation, normalise_textvqa, normalise_words


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # A mark beside a space is deleted, one between letters becomes a space.
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("black-and-white", "black and white"),
        ("t - shirt", "t  shirt"),
        ("yes!", "yes "),
        ("! yes", " yes"),
        # Beside a space once means deleted everywhere, but only that mark.
        ("a-b - c/d", "ab  c d"),
        # digit-comma-digit anywhere deletes every mark; other commas do not count.
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("1,a", "1 a"),
        ("1,,0", "1  0"),
        # Periods go unless a digit follows, whatever stands before.
        ("3.5", "3.5"),
        ("5.", "5"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("v2.x", "v2x"),
        # Colons and apostrophes are no punctuation here.
        ("10:30", "10:30"),
        ("cat's", "cat's"),
        ("", ""),
    ],
)
def test_punctuation(answer: str, expected: str) -> None:
    assert normalise_punctuation(answer) == expected


def test_every_listed_mark_becomes_a_space_between_letters() -> None:
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        assert normalise_punctuation(f"x{mark}y") == "x y", mark


def test_at_most_32_periods_are_deleted_as_the_evaluator_does() -> None:
    assert normalise_punctuation("." * 40) == "." * 8


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Cat and a Dog", "cat and dog"),
        ("an", ""),
        ("None", "0"),
        ("zero one TWO ten", "0 1 2 10"),
        ("eleven twenty-one someone", "eleven twenty-one someone"),
        ("dont", "don't"),
        ("DONT", "don't"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("theyre here", "they're here"),
        ("Im", "im"),  # the table's capitals are out of reach after lower-casing
        ("somebody'd", "somebodyd"),  # the table's own slip
        ("  two\n  spaces ", "2 spaces"),
    ],
)
def test_words(answer: str, expected: str) -> None:
    assert normalise_words(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        (" yes\n", "yes"),
        ("the\tred one.", "red 1"),
        ("1,000 feet", "1000 feet"),
        ("dont know", "don't know"),
        ("A", ""),
        ("A.", ""),
    ],
)
def test_whole_procedure(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Macy's", "macy 's"),
        ("red,blue", "redblue"),
        ("what?", "what"),
        ("1,000", "1000"),
        ("The Red-Sox", "red sox"),
    ],
)
def test_textvqa_variant(answer: str, expected: str) -> None:
    assert normalise_textvqa(answer) == expected
