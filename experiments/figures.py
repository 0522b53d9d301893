"""Figures of finished runs: the trade-off between old and new tasks, and examples of what each model answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from evaluation.records import Example, read_predictions
from experiments.data import BenchmarkData
from experiments.runs import OLD_TASK_NOTE, Run, marked

# Okabe and Ito's colours, which readers with any common colour blindness can tell apart.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F")
MARKERS = "osD^vP*X"
RIGHT, WRONG = "#00704A", "#B2182B"
EXAMPLES = 5


def draw_trade_off(part: pd.DataFrame, title: str, path: Path) -> Path:
    """Mean pretrained score against (mean) target score, one point a method, error bars over seeds."""
    by_seed = part.groupby(["method", "seed", "role"], sort=False)["value"].mean().unstack("role")
    points = by_seed.groupby("method", sort=False).agg(["mean", "std"])
    sees_old_tasks = part.groupby("method")["old_task_data"].any()
    target_count = part.loc[part["role"] == "target", "column"].nunique()
    names = {method: marked(method, sees_old_tasks[method]) for method in points.index}
    legend_width = 0.5 + 0.085 * max(map(len, names.values()))  # inches
    figure, axes = plt.subplots(figsize=(5.5 + legend_width, 5), layout="constrained")
    for number, method in enumerate(points.index):
        old, new = points.loc[method, "pretrained"], points.loc[method, "target"]
        axes.errorbar(
            old["mean"],
            new["mean"],
            xerr=None if pd.isna(old["std"]) else old["std"],
            yerr=None if pd.isna(new["std"]) else new["std"],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],  # no pair twice for 64 methods
            markersize=9,
            linestyle="none",
            capsize=3,
            label=names[method],
        )
    learnt = "score on the target" if target_count == 1 else f"mean score on {target_count} targets"
    axes.set(xlabel="mean score on pretrained benchmarks", ylabel=learnt, title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    if sees_old_tasks.any():
        _annotate(figure)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


@dataclass(frozen=True)
class _Answered:
    """A benchmark's examples with each method's answers and scores by example id."""

    data: BenchmarkData
    examples: Sequence[Example]
    texts: dict[str, dict[str, str]]
    scores: dict[str, dict[str, float]]

    def telling(self) -> Example:
        """The example on which the first two methods (zero-shot and fine-tuned, as a rule) differ most."""
        first, second = [*self.scores.values()][:2] if len(self.scores) > 1 else [*self.scores.values()] * 2
        return max(self.examples, key=lambda example: abs(first[example.id] - second[example.id]))

    def gap(self) -> float:
        means = [sum(scores.values()) / len(scores) for scores in self.scores.values()]
        return abs(means[0] - means[1]) if len(means) > 1 else 0.0


def draw_examples(runs: Sequence[Run], path: Path) -> Path:
    """Pictures with every method's answer: targets, and the benchmarks on which the first two methods differ most.

    Only runs with the first one's seed and data are shown. An answer is green if it scores at least half of what the
    best one does.
    """
    config = OmegaConf.load(runs[0].folder / "config.yaml")
    runs = [run for run in runs if _shows_the_same(run, config)]
    suite = instantiate(config.suite, _convert_="all").values()
    tests = [instantiate(test, _convert_="all") for test in _targets(config).values()]
    old, new = ([_read(data, runs, config.model.adapter.prompt_style) for data in part] for part in (suite, tests))
    chosen = [*sorted(old, key=lambda each: each.gap(), reverse=True)[: EXAMPLES - 1], *new]
    height = max(1.4, 0.62 + 0.2 * len(runs))
    figure, axes = plt.subplots(
        len(chosen), 2, figsize=(11, height * len(chosen)), width_ratios=(1, 5), layout="constrained", squeeze=False
    )
    for (picture, text), each in zip(axes, chosen, strict=True):
        _draw_example(picture, text, each, is_target=any(each is target for target in new))
    if any(run.sees_old_tasks for run in runs):
        _annotate(figure)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _shows_the_same(run: Run, first: DictConfig) -> bool:
    config = OmegaConf.load(run.folder / "config.yaml")
    return all(config[name] == first[name] for name in ("seed", "model", "suite")) and _targets(config) == _targets(
        first
    )


def _targets(config: DictConfig) -> dict[str, DictConfig]:
    """What the targets are scored on, by name: the order does not matter, nor which of them is learnt."""
    return {task.test.benchmark.name: task.test for task in (config.task, *config.other_tasks.values())}


def _annotate(figure: Figure) -> None:
    figure.supxlabel(OLD_TASK_NOTE, fontsize=8, x=0.01, ha="left")


def _draw_example(picture: plt.Axes, text: plt.Axes, answered: _Answered, is_target: bool) -> None:
    example = answered.telling()
    picture.imshow(example.image)
    picture.set_axis_off()
    text.set_axis_off()
    role = "target" if is_target else "pretrained"
    wanted = max(set(example.references), key=example.references.count)
    head = [f"{answered.data.name} ({role}): {example.prompt}", f"a reference: {wanted}"]
    best = max(scores[example.id] for scores in answered.scores.values())
    lines = [(line, "black", "bold" if number == 0 else "normal") for number, line in enumerate(head)]
    for method, texts in answered.texts.items():
        right = best > 0 and answered.scores[method][example.id] >= best / 2
        answer = textwrap.shorten(texts[example.id] or "(nothing)", 110)
        lines.append((f"{'✓' if right else '✗'} {method}: {answer}", RIGHT if right else WRONG, "normal"))
    for number, (line, colour, weight) in enumerate(lines):
        text.text(0, 1 - (number + 0.5) / len(lines), line, color=colour, weight=weight, fontsize=9, va="center")


def _read(data: BenchmarkData, runs: Sequence[Run], prompt_style: str) -> _Answered:
    examples = data.examples(prompt_style)
    texts, scores = {}, {}
    for run in runs:
        predictions = read_predictions(run.folder / "predictions" / f"{data.name}.jsonl")
        method = marked(run.method, run.sees_old_tasks)
        texts[method] = {prediction.id: prediction.text for prediction in predictions}
        scores[method] = dict(data.benchmark.score(examples, texts[method]).per_example)
    return _Answered(data, examples, texts, scores)
