"""Prompts and generation settings are frozen: a change here changes every score made with them."""

import pytest

from evaluation.errors import DataError, PromptError
from evaluation.prompts import Generation, Instruction, instruction

DEFAULTS = {"min_new_tokens": 0, "length_penalty": 1.0, "repetition_penalty": 1.0}
SNAPSHOT = {
    ("llava", "caption"): (
        "Provide a one-sentence caption for the provided image.",
        DEFAULTS | {"num_beams": 1, "max_new_tokens": 64},
    ),
    ("llava", "short_answer"): (
        "{question}\nAnswer the question using a single word or phrase.",
        DEFAULTS | {"num_beams": 1, "max_new_tokens": 16},
    ),
    ("instructblip", "caption"): (
        "A short image caption.",
        DEFAULTS | {"num_beams": 5, "max_new_tokens": 80, "min_new_tokens": 10, "repetition_penalty": 1.5},
    ),
    ("instructblip", "short_answer"): (
        "Question: {question} Short answer:",
        {
            "num_beams": 5,
            "max_new_tokens": 10,
            "min_new_tokens": 1,
            "length_penalty": -1.0,
            "repetition_penalty": 1.5,
        },
    ),
    ("digits_llava", "caption"): ("a short image caption .", DEFAULTS | {"num_beams": 1, "max_new_tokens": 32}),
    ("digits_llava", "short_answer"): ("{question}", DEFAULTS | {"num_beams": 1, "max_new_tokens": 4}),
    ("digits_instructblip", "caption"): ("a short image caption .", DEFAULTS | {"num_beams": 3, "max_new_tokens": 32}),
    ("digits_instructblip", "short_answer"): ("{question}", DEFAULTS | {"num_beams": 1, "max_new_tokens": 4}),
}


@pytest.mark.parametrize(("style", "kind"), SNAPSHOT)
def test_snapshot(style: str, kind: str) -> None:
    found = instruction(style, kind)
    assert (found.template, found.generation.to_json()) == SNAPSHOT[style, kind]


def test_render() -> None:
    asked = instruction("instructblip", "short_answer").render(question="What is {this} in 100%?")
    assert asked == "Question: What is {this} in 100%? Short answer:"
    assert instruction("llava", "caption").render() == "Provide a one-sentence caption for the provided image."


def test_fields_that_do_not_fit_the_template() -> None:
    with pytest.raises(DataError, match="takes the fields question; the benchmark gave none"):
        instruction("llava", "short_answer").render()
    with pytest.raises(DataError, match="takes the fields none; the benchmark gave question"):
        instruction("llava", "caption").render(question="What?")


def test_unknown_style_or_kind_lists_the_known_ones() -> None:
    with pytest.raises(PromptError, match=r"'blip'.*digits_instructblip, digits_llava, instructblip, llava"):
        instruction("blip", "caption")
    with pytest.raises(PromptError, match=r"'llava'.*'poem'.*caption, short_answer"):
        instruction("llava", "poem")


@pytest.mark.parametrize(("beams", "most", "least"), [(0, 4, 0), (1, 0, 0), (1, 4, 5), (1, 4, -1)])
def test_impossible_generation_settings(beams: int, most: int, least: int) -> None:
    with pytest.raises(PromptError, match="max_new_tokens"):
        Generation(num_beams=beams, max_new_tokens=most, min_new_tokens=least)


def test_instructions_are_values() -> None:
    assert Instruction("{question}", Generation(1, 4)) == instruction("digits_llava", "short_answer")
