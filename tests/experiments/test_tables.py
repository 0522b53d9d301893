from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from evaluation.records import Score
from experiments.artifacts import MANIFEST
from experiments.errors import RunsError
from experiments.figures import draw_trade_off
from experiments.runs import OLD_TASK_NOTE, read_run, read_runs, recorded
from experiments.stages.fuse import REPORT
from experiments.tables import _cell, collect, lay_out, newest_sweep, show, summarise
from tests.experiments.conftest import RunSmall


def score(benchmark: str, value: float) -> dict[str, object]:
    return Score(benchmark, "accuracy", "rule", value, 10, "{question}", {"num_beams": 1}, "data", {}).to_json()


def fake_run(
    folder: Path, baseline: str, seed: int, old: float, new: float, *overrides: str, sees_old_tasks: bool = False
) -> None:
    folder.mkdir(parents=True)
    choices = {"model": "m", "task": "t", "baseline": baseline}
    told = {"targets": ["new"], "learnt_targets": ["new"], "sees_old_tasks": sees_old_tasks}
    with recorded(folder, seed=seed, choices=choices, overrides=[*overrides, "batch_size=3"], **told):
        summary = {"average": (old + new) / 2, "h_score": 1.0}
        stored = {"pretrained": [score("old", old)], "targets": [score("new", new)], "summary": summary}
        (folder / "scores.json").write_text(json.dumps(stored))
        (folder / REPORT).write_text(json.dumps({"totals": {"changed_count": 36_900}}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    fake_run(tmp_path / "0", "zero_shot", 0, 90, 10)
    fake_run(tmp_path / "1", "zero_shot", 1, 90, 10)
    fake_run(tmp_path / "2", "tailor", 0, 80, 60, "omega=0.5")
    fake_run(tmp_path / "10", "tailor", 1, 84, 66, "omega=0.5")
    return tmp_path


def test_seeds_are_averaged_and_shared_overrides_left_out(sweep: Path) -> None:
    numbers = collect(read_runs(sweep))
    mean, deviation = summarise(numbers)
    assert list(mean.index) == ["zero_shot", "tailor omega=0.5"]
    assert list(mean.columns) == ["params", "old", "new", "Avg", "H-score"]
    assert mean.loc["tailor omega=0.5", ["old", "new", "Avg"]].tolist() == [82, 63, 72.5]
    assert deviation.loc["tailor omega=0.5", "old"] == pytest.approx(8**0.5)
    assert deviation.loc["zero_shot", "old"] == 0


def test_the_best_is_bold_and_the_second_underlined(sweep: Path) -> None:
    console = Console(width=120, force_terminal=True, color_system="standard", record=True)
    console.print(lay_out(collect(read_runs(sweep)), "title").terminal())
    coloured = console.export_text(styles=True, clear=False)
    plain = console.export_text()
    assert "\x1b[1m90.0 ±0.0\x1b[0m" in coloured
    assert "\x1b[4m82.0 ±2.8\x1b[0m" in coloured
    assert "36.9k" in plain
    assert "new *" in plain


def test_markdown_has_the_same_cells(sweep: Path) -> None:
    lines = lay_out(collect(read_runs(sweep)), "title").markdown().splitlines()
    assert lines[2] == "| method | params | old | new * | Avg | H-score |"
    assert lines[4] == "| zero_shot | 36.9k | **90.0 ±0.0** | <u>10.0 ±0.0</u> | <u>50.0 ±0.0</u> | **1.0 ±0.0** |"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (36_860, "36.9k"), (28_800_000, "28.8M"), (2_710_000_000, "2.71B")]
)
def test_parameters_are_counted_in_fitting_units(count: float, text: str) -> None:
    assert _cell(count, float("nan"), as_count=True) == text


def test_two_runs_of_one_row_are_not_averaged(sweep: Path) -> None:
    fake_run(sweep / "11", "zero_shot", 1, 50, 50)
    with pytest.raises(RunsError, match="two runs claim the same row: zero_shot on m and t, seed 1"):
        collect(read_runs(sweep))


def test_methods_that_saw_old_tasks_are_marked(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the run's files say, whatever the method is called."""
    fake_run(sweep / "11", "anything", 1, 50, 50, sees_old_tasks=True)
    numbers = collect(read_runs(sweep))
    assert set(numbers.loc[numbers["old_task_data"], "method"]) == {"anything"}
    layout = lay_out(numbers, "title")
    assert [name for name, _ in layout.rows] == ["zero_shot", "tailor omega=0.5", "anything † (n=1)"]
    assert layout.markdown().endswith("\n\n† also saw training samples of the pretrained benchmarks\n")
    console = Console(width=120, record=True)
    console.print(layout.terminal())
    assert "† also saw training samples of the pretrained benchmarks" in console.export_text()

    drawn: list[Figure] = []
    monkeypatch.setattr("experiments.figures.plt.close", drawn.append)
    draw_trade_off(numbers, "title", sweep / "marked.png")
    draw_trade_off(numbers[~numbers["old_task_data"]], "title", sweep / "plain.png")
    labels = [[text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in drawn]
    assert labels == [["zero_shot", "tailor omega=0.5", "anything †"], ["zero_shot", "tailor omega=0.5"]]
    assert [figure.get_supxlabel() for figure in drawn] == [OLD_TASK_NOTE, ""]


def test_nothing_is_marked_where_no_method_saw_old_tasks(sweep: Path) -> None:
    layout = lay_out(collect(read_runs(sweep)), "title")
    assert layout.note == ""
    assert "†" not in layout.markdown()


def test_a_run_that_does_not_tell_what_it_saw_is_named(sweep: Path) -> None:
    manifest = json.loads((sweep / "2" / MANIFEST).read_text())
    del manifest["sees_old_tasks"]
    (sweep / "2" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunsError, match=r"lacks sees_old_tasks.*run it again"):
        collect(read_runs(sweep))


def test_a_row_with_fewer_seeds_says_so(sweep: Path) -> None:
    fake_run(sweep / "11", "dare", 1, 50, 50)
    names = [name for name, _ in lay_out(collect(read_runs(sweep)), "title").rows]
    assert names == ["zero_shot", "tailor omega=0.5", "dare (n=1)"]


def test_a_missing_cell_is_shown_as_missing(sweep: Path) -> None:
    numbers = collect(read_runs(sweep))
    holes = numbers[~((numbers["method"] == "zero_shot") & (numbers["column"] == "old"))]
    console = Console(width=120, record=True)
    console.print(lay_out(holes, "title").terminal())
    (line,) = [line for line in console.export_text().splitlines() if "zero_shot" in line]
    assert "–" in line


def test_a_run_without_scores_is_named(sweep: Path) -> None:
    (sweep / "2/scores.json").unlink()
    with pytest.raises(RunsError, match=r"2/scores\.json.*run it again"):
        collect(read_runs(sweep))


def test_scores_edited_by_hand_are_refused(sweep: Path) -> None:
    (sweep / "2/scores.json").write_text('{"pretrained": [{"benchmark": "old"}], "targets": [], "summary": {}}')
    with pytest.raises(Exception, match="expected the fields"):
        collect(read_runs(sweep))


def test_a_folder_without_runs_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILOR_HOME", str(tmp_path))
    with pytest.raises(RunsError, match=r"python -m experiments\.run"):
        read_runs(tmp_path)
    with pytest.raises(RunsError, match="make run"):
        newest_sweep()


def test_the_newest_sweep_is_the_last_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILOR_HOME", str(tmp_path))
    for name in ("2026-01-02_10-00-00", "2026-01-03_09-00-00", "2025-12-31_23-59-59"):
        (tmp_path / "sweeps" / name).mkdir(parents=True)
    assert newest_sweep().name == "2026-01-03_09-00-00"


def test_the_manifest_follows_the_run(tmp_path: Path) -> None:
    with recorded(tmp_path, seed=0, choices={"baseline": "dare"}, overrides=[]) as record:
        assert read_run(tmp_path).manifest["status"] == "running"
        record.update(stages={"base": {"seconds": 1.5}})
        assert read_run(tmp_path).manifest["stages"]["base"]["seconds"] == 1.5
    run = read_run(tmp_path)
    assert run.finished
    assert run.label == "dare"
    with pytest.raises(KeyboardInterrupt), recorded(tmp_path, seed=0, choices={"baseline": "dare"}, overrides=[]):
        raise KeyboardInterrupt
    assert read_run(tmp_path).manifest["status"] == "failed"
    assert "KeyboardInterrupt" in read_run(tmp_path).manifest["error"]


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{half")
    with pytest.raises(RunsError, match=MANIFEST):
        read_run(tmp_path)
    (tmp_path / MANIFEST).write_text('{"status": "finished", "seed": 0}')
    with pytest.raises(RunsError, match="lacks choices, overrides"):
        read_run(tmp_path)


def test_the_trade_off_is_drawn_with_and_without_seeds(sweep: Path) -> None:
    numbers = collect(read_runs(sweep))
    for name, part in (("all", numbers), ("one", numbers[numbers["seed"] == 0])):
        assert draw_trade_off(part, "title", sweep / f"{name}.png").read_bytes()[1:4] == b"PNG"


def test_runs_on_different_data_are_shown(run_small: RunSmall, tmp_path: Path) -> None:
    for count in (5, 4):
        run_small("digits_llava", "digits_flickr", "baseline=magnitude", f"suite.colour.rows.count={count}")
    assert show(tmp_path, Console(width=200, record=True))


def test_a_real_run_is_shown_whole(run_small: RunSmall) -> None:
    run = run_small("digits_llava", "digits_flickr", "baseline=tailor")
    console = Console(width=200, record=True)
    assert show(run.folder, console)
    printed = console.export_text()
    for column in ("caption-in", "colour", "flickr *", "H-score"):
        assert column in printed
    names = {path.name for path in run.folder.iterdir()}
    assert {
        "table.csv",
        "table.md",
        "trade_off_digits_llava_digits_flickr.png",
        "examples_digits_llava_digits_flickr.png",
    } <= names
    table = pd.read_csv(run.folder / "table.csv")
    _, (target,), summary = run.scores()
    assert table.set_index("column").loc["H-score", "value"] == pytest.approx(summary["h_score"])
    assert table.set_index("column").loc["flickr", "value"] == pytest.approx(target.value)
