"""VQA accuracy: how many annotators agree with an answer, averaged over leaving each of them out."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from evaluation.errors import DataError, RuleError
from evaluation.normalise import normalise, normalise_punctuation, normalise_space, normalise_textvqa


class Rule(StrEnum):
    """How answers are normalised before they are compared. Scores made by different rules are not comparable."""

    NORMALISE_BOTH = "normalise_both"
    """Prediction and references, always. What lmms-eval does; our default."""

    OFFICIAL = "official"
    """The evaluator's present state: nothing is normalised beyond white space if all references are equal, since
    such answers are often text read from the image (https://github.com/GT-Vision-Lab/VQA/issues/14)."""

    BEFORE_2021 = "before_2021"
    """The evaluator before March 2021, and LAVIS: the prediction is always normalised, the references only lose
    punctuation, and not even that if all are equal. A reference with a capital or an article cannot be matched."""

    TEXTVQA = "textvqa"
    """EvalAI's TextVQA variant (m4c, LLaVA): both sides, by `normalise_textvqa`."""


def parse_rule(name: str) -> Rule:
    """The rule of that name. Raises RuleError listing the known ones."""
    try:
        return Rule(name)
    except ValueError:
        raise RuleError(f"VQA rule {name!r} is unknown; known: {', '.join(Rule)}") from None


def vqa_accuracy(prediction: str, references: Sequence[str], rule: str = Rule.NORMALISE_BOTH) -> float:
    """Mean over annotators i of min(1, matches among the others / 3), in [0, 1].

    With ten references 1 match scores 0.3, 2 → 0.6, 3 → 0.9, 4 or more → 1. With fewer than four the best score is
    below 1: (n - 1) / 3. A prediction without text is wrong, even where a reference normalises to nothing ("the").

    Raises DataError without references, RuleError for an unknown rule.
    """
    if not references:
        raise DataError("VQA accuracy: the example has no reference answer; check its answers column")
    answer, accepted = _normalised(prediction, references, parse_rule(rule))
    if not prediction.strip():
        return 0.0
    return leave_one_out(matches=accepted.count(answer), annotators=len(accepted))


def leave_one_out(matches: int, annotators: int) -> float:
    """The mean in closed form: the matching annotators see one match fewer among the others."""
    without_a_match = matches * min(1.0, (matches - 1) / 3)
    without_another = (annotators - matches) * min(1.0, matches / 3)
    return (without_a_match + without_another) / annotators


def _normalised(prediction: str, references: Sequence[str], rule: Rule) -> tuple[str, list[str]]:
    match rule:
        case Rule.NORMALISE_BOTH:
            return normalise(prediction), [normalise(each) for each in references]
        case Rule.TEXTVQA:
            return normalise_textvqa(prediction), [normalise_textvqa(each) for each in references]
        case Rule.OFFICIAL:
            spaced = [normalise_space(each) for each in references]
            if _all_equal(spaced):
                return normalise_space(prediction), spaced
            return normalise(prediction), [normalise(each) for each in references]
        case Rule.BEFORE_2021:
            kept = list(references) if _all_equal(references) else [normalise_punctuation(each) for each in references]
            return normalise(prediction), kept


def _all_equal(answers: Sequence[str]) -> bool:
    return len(set(answers)) == 1
