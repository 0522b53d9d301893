from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments.conftest import RunSmall


def wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*wandb*"))


def test_no_tracking_writes_no_file(run_small: RunSmall) -> None:
    assert wandb_files(run_small("digits_llava", "digits_flickr", "baseline=zero_shot").folder) == []


def test_offline_tracking_keeps_everything_in_the_run_folder(
    run_small: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = run_small("digits_llava", "digits_flickr", "baseline=tailor_two_sided", "logger=wandb")
    (record,) = (path for path in wandb_files(run.folder) if path.suffix == ".wandb")
    content = record.read_bytes()
    for expected in (
        b"h_score",
        b"average",
        b"target/flickr",
        b"pretrained/colour",
        b"fusion/changed_count",
        b"old_task_data",
    ):
        assert expected in content
    tables = {path.name.partition("_")[0] for path in run.folder.rglob("*.table.json")}
    assert tables == {"scores", "fusion"}
