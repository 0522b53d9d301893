"""Runs with several targets: all are scored, and stitching baselines learn all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from evaluation.aggregate import average, h_score
from experiments.errors import ConfigError
from experiments.runs import Run, read_run, read_runs
from experiments.stages.fuse import PATCH, REPORT
from experiments.tables import collect, show
from tailor.patch import Patch
from tests.experiments.conftest import RunSmall, also

STITCHED = ("tailor_stitch_paper", "tailor_stitch_mean", "tailor_stitch_joint")
FLICKR = ["digits_llava", "digits_flickr"]
BOTH = also("digits_okvqa")


def stages(run: Run) -> dict[str, dict]:
    return run.manifest["stages"]


@pytest.mark.parametrize(
    ("model", "second", "baseline"),
    [
        *(("digits_llava", "digits_okvqa", baseline) for baseline in STITCHED),
        ("digits_instructblip", "digits_gqa", "tailor_stitch_joint"),
    ],
)
def test_stitching_learns_and_scores_all_targets(run_small: RunSmall, model: str, second: str, baseline: str) -> None:
    run = run_small(model, "digits_flickr", *also(second), f"baseline={baseline}")
    name = {"digits_okvqa": "fruit", "digits_gqa": "opposite"}[second]
    pretrained, targets, summary = run.scores()
    assert [score.benchmark for score in targets] == ["flickr", name]
    values = [[score.value for score in scores] for scores in (pretrained, targets)]
    assert summary == {"average": average(*values), "h_score": h_score(*values)}
    assert len(list((run.folder / "predictions").iterdir())) == 10
    assert (run.manifest["targets"], run.manifest["learnt_targets"]) == (["flickr", name], ["flickr", name])

    report = json.loads((run.folder / REPORT).read_text())
    assert (report["method"], report["settings"]["task_count"]) == ("stitch", 2)
    assert report["settings"]["sparsity"] == 0.05, "both together keep 0.1"
    fused = [row for row in report["tensors"] if row["fate"] == "fused"]
    for row in fused:
        share = round(0.05 * row["numel"])
        assert share <= row["mask_count"] <= 2 * share
        if row["errors"]:
            assert [task["mask_count"] for task in row["tasks"]] == [share, share]
    assert sum(row["changed_count"] for row in fused) == Patch.load(run.folder / PATCH).changed_count


def test_a_tasks_artifacts_serve_runs_with_one_and_with_several_targets(run_small: RunSmall) -> None:
    alone = [stages(run_small("digits_llava", task, "baseline=tailor")) for task in ("digits_flickr", "digits_okvqa")]
    stitched = stages(run_small(*FLICKR, *BOTH, "baseline=tailor_stitch_paper"))
    for stage in ("finetuned", "grams"):
        assert stitched[stage] == alone[0][stage] | {"reused": True}
        assert stitched[f"{stage}/fruit"] == alone[1][stage] | {"reused": True}
    swept = stages(run_small(*FLICKR, *BOTH, "baseline=tailor_stitch_paper", "sparsity=0.3"))
    assert not swept["fused"]["reused"]
    assert all(stage["reused"] for name, stage in swept.items() if name.startswith(("base", "finetuned", "grams")))


def test_other_baselines_learn_the_first_target_alone(run_small: RunSmall) -> None:
    alone = run_small(*FLICKR, "baseline=magnitude")
    among = run_small(*FLICKR, *BOTH, "baseline=magnitude")
    assert stages(among)["fused"] == stages(alone)["fused"] | {"reused": True}
    assert "finetuned/fruit" not in stages(among)
    assert [score.benchmark for score in among.scores()[1]] == ["flickr", "fruit"]
    assert among.scores()[1][0] == alone.scores()[1][0]
    assert among.manifest["learnt_targets"] == ["flickr"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["baseline=tailor_stitch_mean"], "stitching takes several tasks, and there is flickr alone"),
        (["baseline=tailor_stitch_mean", *also("digits_flickr")], "flickr stands twice"),
        (["baseline=dare", *also("digits_flickr")], "flickr stands twice"),
        (["baseline=tailor_stitch_mean", *BOTH, "other_tasks.second.test.benchmark.name=digit"], "digit stands twice"),
    ],
)
def test_targets_that_cannot_be_are_named_before_any_stage(
    run_small: RunSmall, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_small(*FLICKR, *overrides)
    assert "stages" not in read_run(tmp_path / "run0").manifest


def test_patches_of_every_task_stand_in_one_table(run_small: RunSmall, tmp_path: Path) -> None:
    for baseline in ("zero_shot", "tailor", "tailor_stitch_mean"):
        run_small(*FLICKR, *BOTH, f"baseline={baseline}")
    first = tmp_path / "first"
    first.mkdir()
    for folder in tmp_path.glob("run*"):
        folder.rename(first / folder.name)
    second = run_small("digits_llava", "digits_okvqa", *also("digits_flickr"), "baseline=tailor").folder
    console = Console(width=300, record=True)
    assert show(first, console, second)
    printed = console.export_text()
    assert printed.count("digits_llava with the targets flickr + fruit (* target)") == 1
    assert {"examples_digits_llava_flickr_fruit.png", "trade_off_digits_llava_flickr_fruit.png"} <= {
        path.name for path in first.iterdir()
    }
    numbers = collect(read_runs(first, second))
    names = [
        name.partition(" ")[0] + name[name.rfind(" (") :] * name.endswith(")") for name in numbers["method"].unique()
    ]
    assert names == ["zero_shot", "tailor (flickr)", "tailor_stitch_mean", "tailor (fruit)"]
    assert set(numbers.loc[numbers["role"] == "target", "column"]) == {"flickr", "fruit"}
    assert set(pd.read_csv(first / "table.csv")["task"]) == {"flickr + fruit"}
