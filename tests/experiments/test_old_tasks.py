"""Methods that also see samples of the pretrained benchmarks: whose samples, and how their results are marked."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest
import torch
from rich.console import Console

from experiments.artifacts import Artifact, Store
from experiments.context import Context
from experiments.errors import ConfigError
from experiments.pipeline import Pipeline
from experiments.runs import Builds, Record, Run, read_run
from experiments.stages.fuse import REPORT
from experiments.stages.retain import sources
from experiments.tables import show
from tailor.gram import Grams
from tests.experiments.conftest import CAPTIONS, QUESTIONS, SMALL, RunSmall, parts_of
from tests.experiments.pairs import write_samples


def stages(run: Run) -> dict[str, dict]:
    return run.manifest["stages"]


def report(run: Run) -> dict:
    return json.loads((run.folder / REPORT).read_text())


def test_no_scored_image_is_retained() -> None:
    fewer = [f"suite.{name}.train.count=100" for name in (*CAPTIONS, *QUESTIONS)]
    parts = parts_of("experiment=digits_llava_stitched", "baseline=tailor_two_sided", *fewer)
    style = parts.model.adapter.prompt_style
    scored = {
        example.image.tobytes()
        for data in (*parts.suite, *(task.test for task in parts.tasks))
        for example in data.examples(style)
    }
    retained = [sample for source in sources(parts.calibration, parts.suite) for sample in source.samples(0, style)]
    assert len(retained) == parts.calibration.retain_samples == 256
    assert len({sample.image.tobytes() for sample in retained}) == 256, "drawn without repeats"
    assert not scored & {sample.image.tobytes() for sample in retained}


def test_samples_are_spread_evenly_over_the_suite() -> None:
    parts = parts_of("calibration.retain_samples=19")
    found = {source.names: source.count for source in sources(parts.calibration, parts.suite)}
    assert found == {
        ("caption-in", "caption-near", "caption-out"): 9,  # of one source, as all are captioned alike in training
        **{(name,): 2 for name in ("colour", "digit", "where", "parity", "occupied")},
    }
    assert all(source.rows.split == "train" for source in sources(parts.calibration, parts.suite))


def test_samples_are_drawn_anew_for_every_seed() -> None:
    parts = parts_of()
    source = sources(parts.calibration, parts.suite)[1]
    first, again, other = (source.samples(seed, "digits_llava") for seed in (0, 0, 1))
    assert [sample.image.tobytes() for sample in first] == [sample.image.tobytes() for sample in again]
    assert [sample.image.tobytes() for sample in first] != [sample.image.tobytes() for sample in other]


def test_a_sweep_collects_what_it_retains_once(home: Path, tmp_path: Path) -> None:
    def retained(*overrides: str, task: str = "digits_flickr") -> tuple[Pipeline, Artifact]:
        settings = ["baseline=tailor_two_sided", f"task={task}", *SMALL, f"home={home}", *overrides]
        builds = Builds(Store(home), Record(tmp_path, {}))
        pipeline = Pipeline(Context(parts_of(*settings), builds, torch.device("cpu")))
        return pipeline, pipeline.retain

    pipeline, first = retained()
    assert set(Grams.load(first.folder / "samples.safetensors")) == set(pipeline.task.evidence().calibration)
    for override in ("baseline.mu=1", "sparsity=0.02", "omega=0.9", "calibration.damping=0.1"):
        assert retained(override)[1].key == first.key
    assert retained(task="digits_okvqa")[1].key == first.key, "the same layers of the same base"
    for override in ("calibration.retain_samples=8", "suite.digit.train.count=7", "seed=1"):
        assert retained(override)[1].key != first.key


def test_the_retained_samples_hold_the_outputs(run_small: RunSmall) -> None:
    run = run_small("digits_llava", "digits_flickr", "baseline=tailor_two_sided", "baseline.mu=1")
    layers = [row for row in report(run)["tensors"] if row["errors"]]
    assert all(row["retain_token_count"] > 0 for row in layers)
    assert fmean(row["drift"]["two_sided"] for row in layers) < fmean(row["drift"]["exact"] for row in layers)


def test_other_methods_neither_see_nor_key_them(run_small: RunSmall) -> None:
    first = stages(run_small("digits_llava", "digits_flickr", "baseline=tailor"))
    other = stages(run_small("digits_llava", "digits_flickr", "baseline=tailor", "calibration.retain_samples=8"))
    assert "retain" not in first
    assert other["fused"] == first["fused"] | {"reused": True}
    assert run_small("digits_llava", "digits_flickr", "baseline=dare", "suite.colour.train=null").finished


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["calibration.retain=coco.jsonl"], "calibration.retain='coco.jsonl': is neither a JSON Lines file nor suite"),
        (["calibration.retain_samples=7"], "calibration.retain_samples=7: less than one for each of the 8"),
        (["suite.colour.train=null"], "colour has no training rows; state them as `train`"),
        (["suite.digit.train.split=test", "suite.digit.train.count=5"], "the training rows of digit are scored"),
        (
            ["calibration.retain_samples=80"],
            "calibration.retain_samples, of which caption-in, caption-near, caption-out=30: there are 8 rows",
        ),
    ],
)
def test_what_cannot_be_retained_is_named(
    run_small: RunSmall, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_small("digits_llava", "digits_flickr", "baseline=tailor_two_sided", *overrides)
    known = read_run(tmp_path / "run0").manifest
    assert "stages" not in known or "of which" in message, "what the configuration tells is found before any stage"


def test_a_run_that_saw_old_tasks_is_marked_everywhere(run_small: RunSmall, tmp_path: Path) -> None:
    marks = {}
    for baseline in ("tailor_exact", "tailor_two_sided"):
        run = run_small("digits_llava", "digits_flickr", f"baseline={baseline}")
        marks[baseline] = [run.manifest["sees_old_tasks"], report(run)["sees_old_tasks"], run.sees_old_tasks]
    assert marks == {"tailor_exact": [False] * 3, "tailor_two_sided": [True] * 3}

    console = Console(width=240, record=True)
    show(tmp_path, console)
    note = "† also saw training samples of the pretrained benchmarks"
    for shown in (console.export_text(), (tmp_path / "table.md").read_text()):
        assert "tailor_two_sided" in shown and "†" in shown and note in shown
        assert "tailor_exact baseline=tailor_exact †" not in shown
    table = pd.read_csv(tmp_path / "table.csv")
    assert set(table.loc[table["old_task_data"], "method"]) == {"tailor_two_sided baseline=tailor_two_sided"}


def test_samples_of_a_file_stand_for_the_old_tasks(run_small: RunSmall, tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples", 6, with_image=True)
    settings = ("baseline=tailor_two_sided", "calibration.retain_samples=8")
    own, suite = (
        run_small("digits_llava", "digits_okvqa", *settings, f"calibration.retain={source}")
        for source in (samples, "suite")
    )
    assert own.manifest["stages"]["retain"]["key"] != suite.manifest["stages"]["retain"]["key"]
    assert own.sees_old_tasks
