"""Does the embedded world do its part? ``python -m experiments.worlds.check [FOLDER]``, the newest sweep by default.

Reads finished runs and holds against them what the world promises: pretrained models that can do their tasks, targets
that they can't do and that fine-tuning teaches, and forgetting worth studying. Also counts on how many layers one
decorator errs no more than another. Exit code 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.table import Table

from evaluation.records import Score
from experiments.console import console
from experiments.data import BenchmarkData
from experiments.errors import FORESEEN, RunsError
from experiments.runs import Run, read_runs
from experiments.stages.fuse import REPORT
from experiments.tables import newest_sweep
from experiments.worlds.digits import CaptionRows, sixth_captions
from tailor.decorate import DECORATORS

QUESTION_BAR = 70.0
HUMAN_SHARE_BAR = 0.8
QUESTION_RISE_BAR = 30.0
CAPTION_FACTOR_BAR = 2.0
FORGETTING_BAR = 0.1


@dataclass(frozen=True)
class Promise:
    what: str
    bar: str
    found: str
    kept: bool


def promises(runs: list[Run]) -> Iterator[Promise]:
    """What the zero-shot and fine-tune runs of each model and target show. Raises RunsError if one is missing."""
    for model, task in dict.fromkeys(_place(run) for run in runs):
        here = [run for run in runs if _place(run) == (model, task)]
        zero_shot, *tuned = (_of(here, "zero_shot")[0], *_of(here, "finetune"))
        yield from _pretrained(model, zero_shot)
        for run in tuned:
            yield from _finetuned(f"{task}, seed {run.manifest['seed']}", zero_shot, run)
        for run in here:
            yield from _decorated(f"{task}, seed {run.manifest['seed']}", run)


def _pretrained(place: str, run: Run) -> Iterator[Promise]:
    suite = instantiate(OmegaConf.load(run.folder / "config.yaml").suite, _convert_="all")
    by_name: dict[str, BenchmarkData] = {data.name: data for data in suite.values()}
    for score in run.scores()[0]:
        data = by_name[score.benchmark]
        if isinstance(data.rows, CaptionRows):
            examples = data.examples(run_style(run))
            person = data.benchmark.score(examples, sixth_captions(data.rows)).value
            share = score.value / person
            bar, found = f"≥ {HUMAN_SHARE_BAR} × a person's {person:.1f}", f"{score.value:.1f} = {share:.2f} ×"
            yield Promise(f"{place}: {score.benchmark}", bar, found, share >= HUMAN_SHARE_BAR)
        else:
            kept = score.value >= QUESTION_BAR
            yield Promise(f"{place}: {score.benchmark}", f"≥ {QUESTION_BAR}", f"{score.value:.1f}", kept)


def _finetuned(place: str, zero_shot: Run, tuned: Run) -> Iterator[Promise]:
    """The first target is the one that the run was fine-tuned on."""
    (old_before, (before, *_), _), (old_after, (after, *_), _) = zero_shot.scores(), tuned.scores()
    found = f"{before.value:.1f} → {after.value:.1f}"
    if after.metric == "CIDEr":
        bar, kept = f"≥ {CAPTION_FACTOR_BAR} ×", after.value >= CAPTION_FACTOR_BAR * max(before.value, 1.0)
    else:
        bar, kept = f"≥ {QUESTION_RISE_BAR:+}", after.value - before.value >= QUESTION_RISE_BAR
    yield Promise(f"{place}: target learnt", bar, found, kept)
    kept = _mean(old_after) <= (1 - FORGETTING_BAR) * _mean(old_before)
    found = f"{_mean(old_before):.1f} → {_mean(old_after):.1f}"
    yield Promise(f"{place}: forgetting", f"≥ {FORGETTING_BAR:.0%}", found, kept)


def _decorated(place: str, run: Run) -> Iterator[Promise]:
    report: dict[str, Any] = json.loads((run.folder / REPORT).read_text())
    if report["method"] != "Tailor" or run.manifest["overrides"]:
        return
    for tokens, counts in report["decorator_order"].items():
        if counts is None:
            continue
        layers = counts["layer_count"]
        errors = [row["errors"][tokens] for row in report["tensors"] if row["errors"]]
        found = ", ".join(f"{how} {fmean(each[how] for each in errors):.3f}" for how in DECORATORS)
        found += "; " + ", ".join(f"{pair} {count}/{layers}" for pair, count in counts.items() if pair != "layer_count")
        # The optimum holds on the tokens it is computed on; on others it is a finding.
        kept = tokens != "calibration" or counts["exact<=sparsegpt"] == counts["exact<=none"] == layers
        bar = "exact first on all layers" if tokens == "calibration" else "–"
        yield Promise(f"{place}, {run.label}: mean layer error, {tokens} tokens", bar, found, kept)


def run_style(run: Run) -> str:
    return str(OmegaConf.load(run.folder / "config.yaml").model.adapter.prompt_style)


def _place(run: Run) -> tuple[str, str]:
    return run.manifest["choices"]["model"], run.manifest["choices"]["task"]


def _of(runs: list[Run], baseline: str) -> list[Run]:
    found = [run for run in runs if run.manifest["choices"]["baseline"] == baseline]
    if not found:
        raise RunsError(f"{runs[0].folder.parent}: no finished {baseline} run; sweep baseline=zero_shot,finetune")
    return found


def _mean(scores: list[Score]) -> float:
    return fmean(score.value for score in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description="Holds the embedded world's promises against finished runs.")
    parser.add_argument("folder", type=Path, nargs="?", help="folder of a sweep (default: the newest)")
    arguments = parser.parse_args()
    try:
        runs = [run for run in read_runs(arguments.folder or newest_sweep()) if run.finished]
        found = list(promises(runs))
    except FORESEEN as error:
        sys.exit(f"error: {error}")
    table = Table("what", "bar", "found", "")
    for promise in dict.fromkeys(found):
        table.add_row(promise.what, promise.bar, promise.found, "[green]✓[/]" if promise.kept else "[red]✗[/]")
    console(width=140).print(table)
    sys.exit(0 if all(promise.kept for promise in found) else 1)


if __name__ == "__main__":
    main()
