"""Predictions and scores survive their files; files that were tampered with do not pass."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.errors import PredictionError, ScoreFileError
from evaluation.records import Prediction, Score, check_ids, read_predictions, write_predictions

SCORE = Score(
    benchmark="coco",
    metric="CIDEr",
    rule="pycocoevalcap",
    value=114.2,
    count=5000,
    prompt="A short image caption.",
    generation={"num_beams": 5, "length_penalty": -1.0},
    data="karpathy-test@0123abcd",
    details={"empty": 3, "group/near": 99.5},
)
PREDICTIONS = [
    Prediction("1", "what?\nanswer:", "line\u2028break\u2029\x85 \r\n \x0b tab\t"),
    Prediction("2", "日本", ""),
    Prediction("3", '"quoted" \\', "😀 lone \ud83d"),
]


def test_predictions_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "coco.jsonl"
    write_predictions(path, PREDICTIONS)
    assert read_predictions(path) == PREDICTIONS
    assert len(path.read_text().splitlines()) == len(PREDICTIONS)
    assert [each.name for each in tmp_path.iterdir()] == ["coco.jsonl"]


def test_no_predictions_round_trip(tmp_path: Path) -> None:
    write_predictions(tmp_path / "none.jsonl", [])
    assert read_predictions(tmp_path / "none.jsonl") == []


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Prediction]:
        yield PREDICTIONS[0]
        raise KeyboardInterrupt

    path = tmp_path / "coco.jsonl"
    write_predictions(path, PREDICTIONS[:1])
    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, interrupted())
    assert read_predictions(path) == PREDICTIONS[:1]
    assert [each.name for each in tmp_path.iterdir()] == ["coco.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "2", "prompt": "p", "te',  # cut short
        b"",
        b"[]",
        b"null",
        b'{"id": "2", "prompt": "p"}',
        b'{"id": "2", "prompt": "p", "text": "t", "score": 1}',
        b'{"id": 2, "prompt": "p", "text": "t"}',
        b'{"id": "2", "prompt": "p", "text": null}',
        b"\xff\xfe{}",
    ],
)
def test_a_malformed_line_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "coco.jsonl"
    good = b'{"id": "1", "prompt": "p", "text": "t"}'
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(PredictionError, match=r"coco\.jsonl, line 2: "):
        read_predictions(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match=r"coco\.jsonl: cannot be read"):
        read_predictions(tmp_path / "coco.jsonl")


def test_score_round_trip() -> None:
    assert Score.from_json(json.loads(json.dumps(SCORE.to_json()))) == SCORE


@pytest.mark.parametrize("field", list(SCORE.to_json()))
def test_a_stored_score_with_a_missing_or_mistyped_field(field: str) -> None:
    stored = SCORE.to_json()
    with pytest.raises(ScoreFileError, match=field):
        Score.from_json({name: value for name, value in stored.items() if name != field})
    with pytest.raises(ScoreFileError, match=f"wrong type in {field}"):
        Score.from_json(stored | {field: None})


@pytest.mark.parametrize(
    "change", [{"value": True}, {"count": 1.5}, {"details": {"empty": "3"}}, {"unknown": 1}, {"generation": []}]
)
def test_other_mistakes_in_a_stored_score(change: dict[str, object]) -> None:
    with pytest.raises(ScoreFileError):
        Score.from_json(SCORE.to_json() | change)
    with pytest.raises(ScoreFileError, match="found list"):
        Score.from_json([])


def test_check_ids_counts_all_and_lists_some() -> None:
    check_ids(["1", "2"], ["2", "1"], "coco")
    with pytest.raises(PredictionError) as caught:
        check_ids(map(str, range(10)), ["8", "8", "9", "x"], "coco")
    assert str(caught.value) == (
        "coco: of 10 expected predictions, 8 missing (0, 1, 2, 3, 4, …), 1 doubled (8), 1 foreign (x); "
        "generate them anew"
    )
