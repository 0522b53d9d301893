"""Errors and costs of the decorators on random layers: ``python -m experiments.bench.decorators``.

A layer has correlated inputs (mixed from a power-law spectrum, with a few outlier channels) and a heavy-tailed delta;
the mask keeps a tenth of it by the score of Eq. 11. ``exact`` and ``sparsegpt`` are timed in turns in one process,
and the seconds are medians: of decorating alone, sparsegpt's factor of the inverse Gram included, and of a whole
layer of ``Tailor``, which needs that factor for its scores and passes it on. A bar is met if exact takes at most so
many times what sparsegpt does, both alone and as a whole layer, and loses at most ERROR_BAR of what sparsegpt loses.

Writes ``decorators.csv``, ``decorators.png`` and ``decorators.svg``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import torch
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from experiments.artifacts import write_atomically
from experiments.bench.machine import machine
from experiments.console import console
from experiments.figures import COLOURS
from tailor.decorate import DECORATORS, Decorator, decorate, decorate_and_check, layer_error
from tailor.gram import GramAccumulator, Grams
from tailor.method import Rng
from tailor.methods.tailor import Tailor

SPARSITY, OMEGA = 0.1, 0.5
LAYERS = ("512x512", "1024x1024", "2048x2048", "4096x4096", "6144x1408", "1408x6144")
SMALL, SMALL_BAR, LARGE_BAR, ERROR_BAR = 1024, 1.1, 2.0, 0.6
PEERS: tuple[Decorator, ...] = ("sparsegpt", "exact")


class Layer(NamedTuple):
    """A base weight, (out, in), its fine-tuned version, and the Gram of its inputs under the name ``layer``."""

    base: Tensor
    tuned: Tensor
    grams: Grams


def random_layer(outputs: int, inputs: int, device: torch.device, seed: int = 0) -> Layer:
    """Of twice as many tokens as inputs; a hundredth of the channels, or one, are outliers ten times as large."""
    generator = torch.Generator(device).manual_seed(seed)
    spectrum = torch.arange(1, inputs + 1, device=device) ** -0.7
    mixing = spectrum[:, None] * torch.randn(inputs, inputs, device=device, generator=generator)
    outliers = torch.randperm(inputs, device=device, generator=generator)[: max(1, inputs // 100)]
    mixing[:, outliers] *= 10
    accumulator = GramAccumulator("layer")
    for _ in range(2):
        accumulator.add(torch.randn(inputs, inputs, device=device, generator=generator) @ mixing)
    # Student's t of 3 degrees: a normal over the root of a third of the sum of three squared normals.
    squares = torch.randn(3, outputs, inputs, device=device, generator=generator).square_().mean(0)
    delta = 1e-2 * torch.randn(outputs, inputs, device=device, generator=generator) / squares.sqrt_()
    grams = Grams.collect({"layer": "layer"}, {"layer": accumulator})
    return Layer(torch.zeros_like(delta), delta, grams)


def measure(outputs: int, inputs: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """One row of the table: errors, seconds, ratios of exact to sparsegpt, whether bars are met, peak memory."""
    name, base, tuned, grams = "layer", *random_layer(outputs, inputs, device)
    methods = {how: Tailor(SPARSITY, OMEGA, decorator=how) for how in PEERS}
    layer = methods["exact"].choose(name, base, tuned, grams, Rng())
    delta, mask, gram, factor = layer
    checked = {how: decorate_and_check(delta, mask, gram, how, factor=factor) for how in DECORATORS}
    errors = {how: layer_error(delta, each.delta, gram) for how, each in checked.items()}

    def alone(how: Decorator, with_factor: bool = False) -> Callable[[], object]:
        return lambda: decorate(delta, mask, gram, how, factor=factor if with_factor else None)

    def whole(method: Tailor) -> Callable[[], object]:
        return lambda: method.decorations(name, method.choose(name, base, tuned, grams, Rng()))

    actions: dict[str, Callable[[], object]] = {how: alone(how) for how in PEERS}
    actions |= {f"{how}_layer": whole(methods[how]) for how in PEERS}
    actions["sparsegpt_given_factor"] = alone("sparsegpt", with_factor=True)
    seconds = median_seconds(actions, device, repeats)
    row: dict[str, Any] = {"layer": f"{outputs}x{inputs}", "outputs": outputs, "inputs": inputs}
    row |= {f"error_{how}": error for how, error in errors.items()}
    row |= {"error_ratio": errors["exact"] / errors["sparsegpt"], "residual": checked["exact"].residual}
    row |= {f"seconds_{what}": value for what, value in seconds.items()}
    row |= {
        "time_ratio": seconds["exact"] / seconds["sparsegpt"],
        "time_ratio_layer": seconds["exact_layer"] / seconds["sparsegpt_layer"],
        "time_ratio_given_factor": seconds["exact"] / seconds["sparsegpt_given_factor"],
        "time_bar": SMALL_BAR if max(outputs, inputs) <= SMALL else LARGE_BAR,
    }
    row["time_bar_met"] = max(row["time_ratio"], row["time_ratio_layer"]) <= row["time_bar"]
    row["error_bar_met"] = row["error_ratio"] <= ERROR_BAR
    row |= {f"peak_mib_{how}": peak_mib(actions[how], device) for how in PEERS}
    return row


def median_seconds(actions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Each action's median over ``repeats`` rounds, in each of which all take their turn; a round before warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            _settle(device)
            start = time.perf_counter()
            action()
            _settle(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peak_mib(action: Callable[[], object], device: torch.device) -> float | None:
    """Memory in MiB that an action takes at its height beside what was taken before; None where that is not to be had.

    On a CPU this is the process's resident memory, which Linux tells, in pages that the action was first to touch.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        before = _resident_kib("VmRSS")
        action()
        return (_resident_kib("VmHWM") - before) / 2**10
    except OSError:
        return None


def _resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_table(rows: pd.DataFrame, title: str) -> Table:
    """The rows for reading."""
    table = Table(title=title, title_justify="left", title_style="bold")
    heads = ("layer", "error none", "sparsegpt", "exact", "ratio ≤ 0.6", "s sparsegpt", "(factor given)", "s exact")
    for number, head in enumerate((*heads, "ratio", "whole layer", "(factor given)", "bar", "met", "peak MiB")):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows.itertuples():
        peaks = " / ".join(
            "–" if pd.isna(peak) else f"{peak:.0f}" for peak in (row.peak_mib_sparsegpt, row.peak_mib_exact)
        )
        table.add_row(
            row.layer,
            *(f"{error:.3f}" for error in (row.error_none, row.error_sparsegpt, row.error_exact)),
            f"{row.error_ratio:.2f}{'' if row.error_bar_met else ' missed'}",
            f"{row.seconds_sparsegpt:.3f}",
            f"({row.seconds_sparsegpt_given_factor:.3f})",
            f"{row.seconds_exact:.3f}",
            f"{row.time_ratio:.2f}",
            f"{row.time_ratio_layer:.2f}",
            f"({row.time_ratio_given_factor:.2f})",
            f"{row.time_bar:g}",
            "yes" if row.time_bar_met else "no",
            peaks,
        )
    return table


def draw(rows: pd.DataFrame, title: str, paths: Sequence[Path]) -> None:
    """Errors and seconds of the decorators, side by side, layer by layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _draw_bars(left, rows, {how: f"error_{how}" for how in DECORATORS})
    left.set(ylabel="share of the delta's effect that is lost", title="layer error")
    _draw_bars(right, rows, {how: f"seconds_{how}" for how in PEERS})
    right.set(ylabel="seconds", yscale="log", title="time to decorate a layer")
    figure.suptitle(title, fontsize=9)
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_bars(axes: plt.Axes, rows: pd.DataFrame, columns: Mapping[str, str]) -> None:
    width = 0.8 / len(columns)
    for number, (label, column) in enumerate(columns.items()):
        places = [place + (number - (len(columns) - 1) / 2) * width for place in range(len(rows))]
        axes.bar(places, rows[column], width, color=COLOURS[DECORATORS.index(label) + 1], label=label)
    axes.set_xticks(range(len(rows)), rows["layer"], rotation=20)
    axes.grid(axis="y", alpha=0.3)
    axes.margins(y=0.3)  # room for the legend
    axes.legend(frameon=False, ncols=len(columns), loc="upper left")


def _shape(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.partition("x")
    if not (outputs.isdecimal() and inputs.isdecimal() and int(outputs) and int(inputs)):
        raise argparse.ArgumentTypeError(f"{text!r} is no layer; give outputs x inputs, such as 1024x512")
    return int(outputs), int(inputs)


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.decorators", description=__doc__)
    parser.add_argument("--layers", nargs="+", type=_shape, default=[_shape(text) for text in LAYERS], metavar="OUTxIN")
    parser.add_argument("--threads", type=_count, default=2)
    parser.add_argument("--repeats", type=_count, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    progress = tqdm(options.layers, desc="layers", leave=False, dynamic_ncols=True, disable=None)
    rows = pd.DataFrame([measure(*shape, options.device, options.repeats) for shape in progress])
    options.out.mkdir(parents=True, exist_ok=True)
    rows["machine"] = machine()
    write_atomically(options.out / "decorators.csv", rows.to_csv(index=False))
    title = f"decorators, ρ = {SPARSITY:g}, ω = {OMEGA:g}; {machine()}"
    draw(rows, title, [options.out / f"decorators.{kind}" for kind in ("png", "svg")])
    console(width=170).print(as_table(rows, title))


if __name__ == "__main__":
    main()
