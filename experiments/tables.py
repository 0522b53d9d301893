"""Tables and figures of finished runs: ``python -m experiments.tables [FOLDER ...]``, by default of the newest sweep.

Prints, for each model and target (or set of targets), methods against benchmarks in the paper's layout, and writes into
the first folder the same numbers as ``table.csv`` and ``table.md``, the trade-off between old and new tasks, and
examples of what each model answers. Methods that saw samples of old tasks are marked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from experiments.artifacts import write_atomically
from experiments.console import console
from experiments.errors import FORESEEN, RunsError
from experiments.runs import OLD_TASK_NOTE, Run, marked, read_runs
from experiments.stages.fuse import REPORT

SUMMARY = {"average": "Avg", "h_score": "H-score"}
PARAMETERS = "params"
UNITS = ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1), (1, "", 0))


def collect(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a number: model, task, method, old_task_data, seed, column, role and value.

    task: all targets where there are several; old_task_data: whether the method also saw samples of the pretrained
    benchmarks; role: params, pretrained, target or summary.
    """
    rows = []
    for run in runs:
        pretrained, targets, summary = run.scores()
        changed = json.loads((run.folder / REPORT).read_text())["totals"]["changed_count"]
        cells = [(PARAMETERS, PARAMETERS, changed)]
        cells += [(score.benchmark, "pretrained", score.value) for score in pretrained]
        cells += [(score.benchmark, "target", score.value) for score in targets]
        cells += [(SUMMARY[name], "summary", summary[name]) for name in SUMMARY]
        row = (*run.table, run.method, run.sees_old_tasks, run.manifest["seed"])
        rows += [(*row, *cell) for cell in cells]
    columns = ["model", "task", "method", "old_task_data", "seed", "column", "role", "value"]
    numbers = pd.DataFrame(rows, columns=columns)
    cell = ["model", "task", "method", "seed", "column"]
    if (twice := numbers[numbers.duplicated(cell)]).size:
        model, task, method, seed, _ = twice.iloc[0][cell]
        raise RunsError(
            f"two runs claim the same row: {method} on {model} and {task}, seed {seed}; show their folders one by one"
        )
    return numbers


def summarise(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(mean, standard deviation) over seeds of one model and task: methods in order of appearance × columns."""
    order = {axis: list(dict.fromkeys(part[axis])) for axis in ("method", "column")}
    pivot = part.pivot_table(index="method", columns="column", values="value", aggfunc=["mean", "std"], sort=False)
    frames = (pivot.get(what, pd.DataFrame()) for what in ("mean", "std"))
    mean, deviation = (frame.reindex(index=order["method"], columns=order["column"]) for frame in frames)
    return mean, deviation


@dataclass(frozen=True)
class Layout:
    """A table ready to be written: a row's cells are (text, style), style one of "", bold and underline."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[tuple[str, str]]]]
    note: str

    def terminal(self) -> Table:
        table = Table(title=self.title, title_justify="left", title_style="bold")
        if self.note:
            table.caption, table.caption_justify = self.note, "left"
        for number, column in enumerate(("method", *self.columns)):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for method, cells in self.rows:
            table.add_row(method, *(f"[{style}]{text}[/]" if style else text for text, style in cells))
        return table

    def markdown(self) -> str:
        marks = {"": ("", ""), "bold": ("**", "**"), "underline": ("<u>", "</u>")}
        lines = [f"**{self.title}**", "", f"| method | {' | '.join(self.columns)} |"]
        lines.append("|---|" + "---:|" * len(self.columns))
        for method, cells in self.rows:
            styled = [text.join(marks[style]) for text, style in cells]
            lines.append(f"| {method} | {' | '.join(styled)} |")
        lines += ["", self.note] if self.note else []
        return "\n".join(lines) + "\n"


def lay_out(part: pd.DataFrame, title: str) -> Layout:
    """The table of one model and task; in each column the best is bold and the second best underlined."""
    mean, deviation = summarise(part)
    roles = part.drop_duplicates("column").set_index("column")["role"]
    styles = {column: _styles(mean[column]) for column in mean.columns if roles[column] != PARAMETERS}
    rows = []
    seeds = part.groupby("method")["seed"].nunique()
    sees_old_tasks = part.groupby("method")["old_task_data"].any()
    for method in mean.index:
        name = marked(method, sees_old_tasks[method])
        name += "" if seeds[method] == seeds.max() else f" (n={seeds[method]})"
        cells = []
        for column in mean.columns:
            spread = deviation.loc[method, column]
            text = _cell(mean.loc[method, column], spread, as_count=roles[column] == PARAMETERS)
            cells.append((text, styles[column][method] if column in styles else ""))
        rows.append((name, cells))
    columns = [f"{column} *" if roles[column] == "target" else str(column) for column in mean.columns]
    return Layout(title, columns, rows, note=OLD_TASK_NOTE if sees_old_tasks.any() else "")


def _styles(values: pd.Series) -> dict[str, str]:
    ranked = sorted(values.dropna().round(2).unique(), reverse=True)
    marks = dict(zip(ranked, ("bold", "underline"), strict=False))
    return {method: marks.get(value, "") for method, value in values.round(2).items()}


def _cell(value: float, spread: float, as_count: bool) -> str:
    if pd.isna(value):
        return "–"
    if as_count:
        return next(f"{value / unit:.{digits}f}{name}" for unit, name, digits in UNITS if value >= unit or unit == 1)
    return f"{value:.1f}" if pd.isna(spread) else f"{value:.1f} ±{spread:.1f}"


def newest_sweep() -> Path:
    """The sweep under TAILOR_HOME that started last. Raises RunsError if there is none."""
    home = Path(os.environ.get("TAILOR_HOME", "outputs"))
    sweeps = sorted(path for path in (home / "sweeps").glob("*") if path.is_dir())
    if not sweeps:
        raise RunsError(f"{home / 'sweeps'}: holds no sweep; make one with `make run`")
    return sweeps[-1]


def show(folder: Path, out: Console, *others: Path) -> bool:
    """Prints tables and draws figures, into ``folder``, of the runs there and in ``others``; True if all finished."""
    from experiments.figures import draw_examples, draw_trade_off  # matplotlib: only for those who draw

    runs = read_runs(folder, *others)
    finished = [run for run in runs if run.finished]
    if not finished:
        raise RunsError(f"{folder}: none of its {len(runs)} runs has finished; the first says: {_reason(runs[0])}")
    numbers = collect(finished)
    write_atomically(folder / "table.csv", numbers.to_csv(index=False))
    written = [folder / "table.csv", folder / "table.md"]
    tables = []
    for (model, task), part in numbers.groupby(["model", "task"], sort=False):
        seeds = part["seed"].nunique()
        over = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
        several = part.loc[part["role"] == "target", "column"].nunique() > 1
        what = "with the targets" if several else "fine-tuned on"  # one row may have learnt both, another either
        layout = lay_out(part, f"{model} {what} {task}{over} (* target)")
        out.print(layout.terminal())
        tables.append(layout.markdown())
        here = [run for run in finished if run.table == (model, task)]
        name = f"{model}_{task.replace(' + ', '_')}"
        written += [
            draw_trade_off(part, f"{model}, {task}", folder / f"trade_off_{name}.png"),
            draw_examples(here, folder / f"examples_{name}.png"),
        ]
    write_atomically(folder / "table.md", "\n".join(tables))
    for run in runs:
        if not run.finished:
            out.print(f"[red]{run.manifest['status']}[/]: {run.label} ({run.folder}): {_reason(run)}")
    for each in (folder, *others):
        out.print(f"runs: {each}", soft_wrap=True)
    if others:
        out.print(f"files in {folder}:", soft_wrap=True)
    for path in written:
        out.print(f"      {path.name}", soft_wrap=True)
    return len(finished) == len(runs)


def _reason(run: Run) -> str:
    return str(run.manifest["error"]).strip().splitlines()[-1] if "error" in run.manifest else "it never ended"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and figures of finished runs.")
    parser.add_argument(
        "folder", type=Path, nargs="*", help="folders of sweeps or runs, shown together (default: the newest sweep)"
    )
    arguments = parser.parse_args()
    try:
        first, *others = arguments.folder or [newest_sweep()]
        whole = show(first, console(width=200), *others)
    except FORESEEN as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
