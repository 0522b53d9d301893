"""One number for many benchmarks: the average, and the H-score of arXiv 2402.12048."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from evaluation.errors import AggregateError


def average(pretrained: Sequence[float], target: Sequence[float]) -> float:
    """Avg: the mean over all benchmarks, pretrained and target alike. Raises AggregateError as `h_score` does."""
    return fmean([*_checked(pretrained, "pretrained"), *_checked(target, "target")])


def h_score(pretrained: Sequence[float], target: Sequence[float]) -> float:
    """Harmonic mean of the mean pretrained and the mean target score, 0 where either is 0 (Eq. 32).

    Raises AggregateError if a list is empty or a score is negative or not finite.
    """
    kept, learnt = fmean(_checked(pretrained, "pretrained")), fmean(_checked(target, "target"))
    if kept == 0 or learnt == 0:
        return 0.0
    return 2 * kept * learnt / (kept + learnt)


def _checked(scores: Sequence[float], role: str) -> Sequence[float]:
    if not scores:
        raise AggregateError(f"{role} benchmarks: no score to average; score at least one")
    if wrong := [score for score in scores if not math.isfinite(score) or score < 0]:
        raise AggregateError(f"{role} benchmarks: scores must be finite and not negative; found {wrong}")
    return scores
