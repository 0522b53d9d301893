"""Answer normalising of the official VQA evaluator.

Source: PythonEvaluationTools/vqaEvaluation/vqaEval.py of https://github.com/GT-Vision-Lab/VQA. Its oddities are part of
the measure and are kept: whether a punctuation mark is deleted or becomes a space is decided once for the whole answer,
"no one" becomes "no 1", and the answer "A" becomes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Final

PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES: Final = frozenset({"a", "an", "the"})
NUMBER_WORDS: Final[Mapping[str, str]] = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}

_COMMA_IN_NUMBER: Final = re.compile(r"\d,\d")
_PERIOD_NOT_BEFORE_DIGIT: Final = re.compile(r"\.(?!\d)")
# The evaluator passes re.UNICODE where re.sub expects a count, so it deletes that many periods at most.
_MOST_PERIODS: Final = int(re.UNICODE)


def normalise(answer: str) -> str:
    """The whole official procedure: white space, punctuation, then words."""
    return normalise_words(normalise_punctuation(normalise_space(answer)))


def normalise_textvqa(answer: str) -> str:
    """The TextVQA variant: lower case, commas and question marks deleted, "'s" set apart, then the official procedure.

    Source: EvalAIAnswerProcessor in pythia/tasks/processors.py of https://github.com/facebookresearch/mmf.
    """
    return normalise(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def normalise_space(answer: str) -> str:
    """New lines and tabs become spaces, the ends are stripped."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise_punctuation(answer: str) -> str:
    """Delete or blank each punctuation mark, delete periods that are not before a digit.

    A mark is deleted if it stands next to a space anywhere in the answer, or if the answer has a digit-comma-digit;
    otherwise it becomes a space.
    """
    delete_all = _COMMA_IN_NUMBER.search(answer) is not None
    marked = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        marked = marked.replace(mark, "" if delete_all or beside_space else " ")
    return _PERIOD_NOT_BEFORE_DIGIT.sub("", marked, count=_MOST_PERIODS)


def normalise_words(answer: str) -> str:
    """Lower case; number words to digits; articles dropped; apostrophes of contractions restored; single spaces."""
    words = (NUMBER_WORDS.get(word, word) for word in answer.lower().split())
    return " ".join(_contractions().get(word, word) for word in words if word not in ARTICLES)


@cache
def _contractions() -> Mapping[str, str]:
    """Contraction without its apostrophes → with them, as the evaluator lists them."""
    table: dict[str, str] = json.loads(files("evaluation").joinpath("vqa_contractions.json").read_text("utf-8"))
    return table
