"""What a user types and sees: exit codes, messages, the table after a sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.runs import MANIFEST, read_runs
from tests.experiments.conftest import ROOT, SMALL


def command(module: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TAILOR_HOME": str(home), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_help_lists_the_choices(tmp_path: Path) -> None:
    done = command("experiments.run", "--help", home=tmp_path)
    assert done.returncode == 0
    assert "baseline: dare, finetune, grafting" in done.stdout
    assert "model: digits_instructblip, digits_llava" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baseline=tailr", "Could not find 'baseline/tailr'"),
        ("model=gpt", "Could not find 'model/gpt'"),
        ("task=chess", "Could not find 'task/chess'"),
        ("sparcity=0.1", "sparcity"),
        ("+sparcity=0.1", "Key 'sparcity' not in 'RunConfig'"),
        ("sparsity=1.5", "sparsity=1.5 is outside [0, 1]"),
        ("omega=2", "omega=2.0 is outside [0, 1]"),
    ],
)
def test_a_wrong_override_is_one_message(tmp_path: Path, override: str, message: str) -> None:
    done = command("experiments.run", override, "logger=none", home=tmp_path)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_home_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    done = command("experiments.run", "logger=none", home=tmp_path / "home")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "TAILOR_HOME" in done.stderr


def test_a_sweep_goes_on_after_a_failed_job_and_says_so(tmp_path: Path) -> None:
    swept = command("experiments.run", "-m", *SMALL, "baseline=magnitude", "sparsity=7,0.1,-1", home=tmp_path)
    assert swept.returncode == 1
    assert "Traceback" not in swept.stdout + swept.stderr
    assert swept.stderr.count("failed: ") == 2
    (sweep,) = (tmp_path / "sweeps").iterdir()
    assert [run.manifest["status"] for run in read_runs(sweep)] == ["failed", "finished", "failed"]

    shown = command("experiments.tables", home=tmp_path)
    assert shown.returncode == 1, "a table of a sweep with failed runs is not the whole table"
    assert "magnitude sparsity=0.1" in shown.stdout
    assert shown.stdout.count("failed: ") == 2
    assert "sparsity=7.0 is outside [0, 1]" in shown.stdout
    assert (sweep / "trade_off_digits_llava_digits_flickr.png").stat().st_size > 10_000


def test_jobs_of_joblib_share_artifacts(tmp_path: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = command("experiments.run", "-m", *launcher, *SMALL, "baseline=dare,magnitude", home=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "sweeps").iterdir()
    assert all(run.manifest["versions"].keys() >= {"python", "torch", "transformers"} for run in read_runs(sweep))
    stages = [run.manifest["stages"] for run in read_runs(sweep)]
    for stage in ("base", "finetuned"):
        assert sorted(each[stage]["reused"] for each in stages) == [False, True], stage
        assert len({each[stage]["key"] for each in stages}) == 1


def test_tables_without_runs_say_how_to_make_some(tmp_path: Path) -> None:
    done = command("experiments.tables", home=tmp_path)
    assert done.returncode == 1
    assert "make run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_run_is_not_a_finished_one(tmp_path: Path) -> None:
    folder = tmp_path / "sweeps/now/0"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(
        json.dumps({"status": "running", "choices": {"baseline": "tailor"}, "overrides": [], "seed": 0})
    )
    done = command("experiments.tables", home=tmp_path)
    assert done.returncode == 1
    assert "none of its 1 runs has finished" in done.stderr
