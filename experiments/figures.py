"""Figures of finished runs: the trade-off between old and new tasks, and examples of what each model answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from evaluation.records import Example, read_predictions
from experiments.data import BenchmarkData
from experiments.runs import Run

# Okabe and Ito's colours, which readers with any common colour blindness can tell apart.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F")
MARKERS = "osD^vP*X"
RIGHT, WRONG = "#00704A", "#B2182B"
EXAMPLES = 5


def draw_trade_off(part: pd.DataFrame, title: str, path: Path) -> Path:
    """Mean pretrained score against target score, one point a method, error bars over seeds."""
    by_seed = part.groupby(["method", "seed", "role"], sort=False)["value"].mean().unstack("role")
    points = by_seed.groupby("method", sort=False).agg(["mean", "std"])
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for number, method in enumerate(points.index):
        old, new = points.loc[method, "pretrained"], points.loc[method, "target"]
        axes.errorbar(
            old["mean"],
            new["mean"],
            xerr=None if pd.isna(old["std"]) else old["std"],
            yerr=None if pd.isna(new["std"]) else new["std"],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=9,
            linestyle="none",
            capsize=3,
            label=method,
        )
    axes.set(xlabel="mean score on pretrained benchmarks", ylabel="score on the target", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
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
    """Pictures with every method's answer: the target, and the benchmarks on which the first two methods differ most.

    Only runs with the first one's seed and data are shown. An answer is green if it scores at least half of what the
    best one does.
    """
    config = OmegaConf.load(runs[0].folder / "config.yaml")
    runs = [run for run in runs if _shows_the_same(run, config)]
    suite = [*instantiate(config.suite, _convert_="all").values(), instantiate(config.task, _convert_="all").test]
    answered = [_read(data, runs, config.model.adapter.prompt_style) for data in suite]
    old = sorted(answered[:-1], key=lambda each: each.gap(), reverse=True)[: EXAMPLES - 1]
    chosen = [*old, answered[-1]]
    height = max(1.4, 0.62 + 0.2 * len(runs))
    figure, axes = plt.subplots(
        len(chosen), 2, figsize=(11, height * len(chosen)), width_ratios=(1, 5), layout="constrained", squeeze=False
    )
    for (picture, text), each in zip(axes, chosen, strict=True):
        _draw_example(picture, text, each, is_target=each is answered[-1])
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _shows_the_same(run: Run, first: DictConfig) -> bool:
    config = OmegaConf.load(run.folder / "config.yaml")
    return all(config[name] == first[name] for name in ("seed", "model", "task", "suite"))


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
        texts[run.label] = {prediction.id: prediction.text for prediction in predictions}
        scores[run.label] = dict(data.benchmark.score(examples, texts[run.label]).per_example)
    return _Answered(data, examples, texts, scores)
