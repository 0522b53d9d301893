from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.records import Score
from experiments.errors import RunsError
from experiments.runs import Run, read_run, recorded
from experiments.worlds.check import _decorated, _finetuned, promises
from experiments.worlds.digits import CaptionRows, sixth_captions
from tests.experiments.conftest import RunSmall


def run_with(folder: Path, old: list[float], target: float, metric: str) -> Run:
    def score(value: float) -> dict[str, object]:
        return Score("name", metric, "rule", value, 10, "{question}", {"num_beams": 1}, "data", {}).to_json()

    with recorded(folder, seed=0, choices={"baseline": "finetune"}, overrides=[]):
        stored = {"pretrained": [score(value) for value in old], "targets": [score(target)], "summary": {}}
        (folder / "scores.json").write_text(json.dumps(stored))
    return read_run(folder)


@pytest.mark.parametrize(
    ("metric", "before", "after", "learnt"),
    [
        ("VQA accuracy", 10, 40, ("10.0 → 40.0", True)),
        ("VQA accuracy", 10, 39, ("10.0 → 39.0", False)),
        ("CIDEr", 20, 40, ("20.0 → 40.0", True)),
        ("CIDEr", 20, 39, ("20.0 → 39.0", False)),
    ],
)
def test_learning_and_forgetting_by_hand(
    tmp_path: Path, metric: str, before: float, after: float, learnt: tuple[str, bool]
) -> None:
    base = run_with(tmp_path / "base", [100, 80], before, metric)
    tuned = run_with(tmp_path / "tuned", [85, 75], after, metric)
    target, forgetting = _finetuned("here", base, tuned)
    assert (target.found, target.kept) == learnt
    assert (forgetting.found, forgetting.kept) == ("90.0 → 80.0", True)


def test_a_layer_on_which_exact_is_not_first_breaks_the_promise(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", [1], 1, "CIDEr")
    counts = {"layer_count": 9, "exact<=sparsegpt": 8, "sparsegpt<=none": 9, "exact<=none": 9}
    errors = {tokens: {"none": 0.5, "sparsegpt": 0.25, "exact": 0.125} for tokens in ("calibration", "held_out")}
    tensors = [{"errors": None}, {"errors": errors}]
    report = {"method": "Tailor", "decorator_order": {"calibration": counts, "held_out": counts}, "tensors": tensors}
    (run.folder / "fusion_report.json").write_text(json.dumps(report))
    calibration, held_out = _decorated("here", run)
    assert not calibration.kept
    assert "exact<=sparsegpt 8/9" in calibration.found
    assert "none 0.500, sparsegpt 0.250, exact 0.125" in calibration.found
    assert held_out.kept, "on tokens that it was not computed on the optimum is a finding"


def test_promises_are_read_from_real_runs(run_small: RunSmall) -> None:
    runs = [run_small("digits_llava", "digits_flickr", f"baseline={name}") for name in ("zero_shot", "finetune")]
    found = list(promises(runs))
    assert [promise.what.partition(": ")[2] for promise in found] == [
        *("caption-in", "caption-near", "caption-out", "colour", "digit", "where", "parity", "occupied"),
        *("target learnt", "forgetting"),
    ]
    assert not found[0].kept, "two steps of pretraining caption nothing"
    with pytest.raises(RunsError, match="no finished finetune run"):
        list(promises(runs[:1]))


def test_a_sixth_person_sees_the_same_scenes() -> None:
    rows = CaptionRows("test", "studio", "everyday", "any", 20)
    sixth = sixth_captions(rows)
    for row in rows.load():
        words = {word for caption in row["captions"] for word in caption.split()}
        colours = {"red", "green", "blue", "yellow", "pink", "white"}
        assert colours & set(sixth[row["image_id"]].split()) <= words
