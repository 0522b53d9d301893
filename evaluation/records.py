"""What travels between data, model and scorer: examples, predictions and scores, and their files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeAlias

from evaluation.errors import PredictionError, ScoreFileError

ExampleScores: TypeAlias = Mapping[str, float]
"""Example id → its score, scaled by 100 as `Score.value` is."""


@dataclass(frozen=True)
class Example:
    """One question to a model. `group` names a part of the benchmark to be reported apart, "" for none."""

    id: str
    prompt: str
    references: tuple[str, ...]
    image: object = field(repr=False)
    group: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a model generated for the example `id`, and the prompt it was given (before any conversation wrapper)."""

    id: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Score:
    """A benchmark's score with everything needed to know what it means.

    `value` is scaled by 100 and taken over `count` examples; `prompt` is the template and `generation` the settings
    that the predictions were made with; `data` is the revision or fingerprint of the rows. `details` holds further
    numbers: "empty" (predictions without text, counted as wrong) and "group/<name>" (the mean over that group).
    """

    benchmark: str
    metric: str
    rule: str
    value: float
    count: int
    prompt: str
    generation: Mapping[str, float]
    data: str
    details: Mapping[str, float]

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: object) -> Score:
        """The score that `to_json` stored. Raises ScoreFileError if a field is missing, unknown or of another type."""
        names = [each.name for each in fields(cls)]
        if not isinstance(stored, dict) or set(stored) != set(names):
            found = ", ".join(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__
            raise ScoreFileError(f"stored score: expected the fields {', '.join(names)}; found {found}; score again")
        texts = ("benchmark", "metric", "rule", "prompt", "data")
        valid = {name: isinstance(stored[name], str) for name in texts}
        valid["value"] = _is_number(stored["value"])
        valid["count"] = _is_number(stored["count"]) and isinstance(stored["count"], int)
        for name in ("generation", "details"):
            plain = stored[name]
            valid[name] = isinstance(plain, dict) and all(
                isinstance(key, str) and _is_number(value) for key, value in plain.items()
            )
        if wrong := [name for name in names if not valid[name]]:
            raise ScoreFileError(f"stored score {stored['benchmark']}: wrong type in {', '.join(wrong)}; score again")
        return cls(**stored)


def check_ids(expected: Iterable[str], found: Iterable[str], place: str) -> None:
    """Raise PredictionError unless `found` holds every expected id exactly once and no other."""
    wanted, counts = dict.fromkeys(expected), Counter(iter(found))  # iter: of a mapping, count the keys
    problems = {
        "missing": [each for each in wanted if each not in counts],
        "doubled": [each for each, count in counts.items() if count > 1],
        "foreign": [each for each in counts if each not in wanted],
    }
    findings = [f"{len(ids)} {problem} ({_some(ids)})" for problem, ids in problems.items() if ids]
    if findings:
        raise PredictionError(
            f"{place}: of {len(wanted)} expected predictions, {', '.join(findings)}; generate them anew"
        )


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write JSON Lines, one prediction a line; `path` appears or changes only when all are written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="ascii", newline="\n") as lines:
            # json escapes whatever is not ASCII: U+2028 or a lone surrogate cannot break a line or the encoding.
            lines.writelines(json.dumps(asdict(each)) + "\n" for each in predictions)
            lines.flush()
            os.fsync(lines.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a JSON Lines file, in order. Raises PredictionError naming the file and the line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PredictionError(f"{path}: cannot be read ({error.strerror}); generate the predictions first") from error
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return [_parse_prediction(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse_prediction(line: bytes, place: str) -> Prediction:
    try:
        stored = json.loads(line)
    except ValueError as error:  # covers bytes that are not UTF-8
        raise PredictionError(f"{place}: not JSON ({error}); generate the predictions anew") from error
    names = {each.name for each in fields(Prediction)}
    if (
        not isinstance(stored, dict)
        or set(stored) != names
        or not all(isinstance(each, str) for each in stored.values())
    ):
        raise PredictionError(f"{place}: expected an object with the texts id, prompt and text; found {line[:80]!r}")
    return Prediction(**stored)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _some(ids: list[str], limit: int = 5) -> str:
    return ", ".join(ids[:limit]) + (", …" if len(ids) > limit else "")
