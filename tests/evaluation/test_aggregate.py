"""Avg and H-score against rows of the paper's Table 1, and the edges."""

import math

import pytest

from evaluation.aggregate import average, h_score
from evaluation.errors import AggregateError

# Table 1, InstructBLIP, target Flickr30k: COCO, NoCaps in/near/out, OKVQA, AOKVQA, VQAv2, GQA | target | Avg | H.
ROWS = {
    "zero-shot": ([143.1, 117.7, 123.5, 121.9, 58.45, 58.24, 76.66, 49.18], [82.8], 92.39, 87.87),
    "fine-tune": ([114.2, 101.9, 113.2, 112.3, 54.47, 55.30, 74.26, 47.29], [101.8], 86.08, 92.12),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_papers_values(row: str) -> None:
    pretrained, target, printed_average, printed_h_score = ROWS[row]
    assert average(pretrained, target) == pytest.approx(printed_average, abs=0.005)
    assert h_score(pretrained, target) == pytest.approx(printed_h_score, abs=0.015)


def test_by_hand() -> None:
    assert average([30, 60], [90]) == 60
    assert h_score([20, 40], [60]) == 40  # 2 * 30 * 60 / 90
    assert h_score([50, 70], [40, 80]) == 60  # equal means


@pytest.mark.parametrize(("pretrained", "target"), [([0], [50]), ([50, 60], [0]), ([0, 0], [0])])
def test_h_score_is_0_where_either_side_is(pretrained: list[float], target: list[float]) -> None:
    assert h_score(pretrained, target) == 0.0


@pytest.mark.parametrize("function", [average, h_score])
@pytest.mark.parametrize(
    ("pretrained", "target", "finding"),
    [
        ([], [1.0], "pretrained benchmarks: no score"),
        ([1.0], [], "target benchmarks: no score"),
        ([1.0, math.nan], [1.0], r"pretrained benchmarks: .* found \[nan\]"),
        ([1.0], [math.inf], r"target benchmarks: .* found \[inf\]"),
        ([1.0], [-0.5], r"target benchmarks: .* found \[-0.5\]"),
    ],
)
def test_scores_without_an_average(function, pretrained: list[float], target: list[float], finding: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AggregateError, match=finding):
        function(pretrained, target)
