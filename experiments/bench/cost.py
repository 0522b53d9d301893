"""Time and memory of fusing against hidden size, layers and samples: measured, and what the cost model makes of it.

python -m experiments.bench.cost [--out FOLDER]

Whole fusions of small pairs of LLaVA's shape with the exact decorator at ρ = 0.1, each in a process of its own, beside
what `experiments.cost` predicts from shapes and this machine's rates; then its predictions for large models.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from experiments.bench.llava_pair import Shape, make_pair, make_samples
from experiments.bench.machine import machine
from experiments.bench.measured import Measured, fuse_measured
from experiments.cost import Cost, Layer, Rates, cost, measure

SPARSITY = 0.1
TOKENS = 64 + 40  # slots of a small picture, and words
MEMORY_GB = 8.0
USUAL = Shape(hidden=512, intermediate=1376, blocks=2)
SWEEPS: dict[str, list[tuple[Shape, int]]] = {
    "hidden": [(Shape(hidden, hidden * 43 // 16, 1), 32) for hidden in (256, 512, 1024, 2048)],
    "layers": [(Shape(USUAL.hidden, USUAL.intermediate, blocks), 32) for blocks in (1, 2, 4, 8)],
    "samples": [(USUAL, samples) for samples in (16, 64, 256)],
}


@dataclass(frozen=True)
class Large:
    """A language model whose blocks are all fused; ``kv`` is the width of its keys and values."""

    hidden: int
    intermediate: int
    blocks: int
    kv: int
    parameters: float


LARGE = {
    "7B": Large(4096, 11_008, 32, 4096, 6.7e9),
    "13B": Large(5120, 13_824, 40, 5120, 13.0e9),
    "70B": Large(8192, 28_672, 80, 1024, 69.0e9),
}
LARGE_TOKENS = 128 * 640  # sequences with a picture of 576 slots


def block_layers(hidden: int, intermediate: int, kv: int) -> list[Layer]:
    """The linear layers of a block: q, k, v, o, gate, up, down."""
    attention = [Layer(hidden, hidden), Layer(kv, hidden), Layer(kv, hidden), Layer(hidden, hidden)]
    return [*attention, Layer(intermediate, hidden), Layer(intermediate, hidden), Layer(hidden, intermediate)]


def predict(
    hidden: int, intermediate: int, blocks: int, kv: int, parameters: float, tokens: int, item_bytes: int, rates: Rates
) -> Cost:
    """What the model says of fusing all blocks."""
    return cost(
        block_layers(hidden, intermediate, kv) * blocks,
        [hidden, hidden, hidden, intermediate] * blocks,
        int(3 * parameters * item_bytes),
        rates,
        sparsity=SPARSITY,
        decorator="exact",
        parameters_run=int(parameters),
        tokens=tokens,
        gram_memory=int(MEMORY_GB * 1e9),
    )


def point(shape: Shape, samples: int, threads: int) -> Measured:
    """One measured fusion."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pretrained, finetuned = make_pair(folder, shape, torch.float32)
        data = make_samples(folder / "samples", shape, samples)
        return fuse_measured(
            folder / "fuse",
            f"pretrained={pretrained}",
            f"finetuned={finetuned}",
            f"calibration.data={data}",
            f"calibration.samples={samples}",
            f"calibration.memory_gb={MEMORY_GB}",
            f"sparsity={SPARSITY}",
            f"threads={threads}",
        )


def measured(rates: Rates, threads: int) -> pd.DataFrame:
    """All points of `SWEEPS`, one row each, with the model's predictions beside."""
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for sweep, points in SWEEPS.items():
        for shape, samples in points:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                found = pool.submit(point, shape, samples, threads).result()
            size = shape.hidden, shape.intermediate
            parameters = shape.blocks * sum(layer.rows * layer.width for layer in block_layers(*size, shape.hidden))
            expected = predict(*size, shape.blocks, shape.hidden, parameters, samples * TOKENS, 4, rates)
            rows.append(
                {
                    "sweep": sweep,
                    "hidden": shape.hidden,
                    "layers": shape.blocks,
                    "samples": samples,
                    **found._asdict(),
                    "predicted_calibrating": expected.calibrating,
                    "predicted_fusing": expected.fusing,
                }
            )
            print(pd.DataFrame(rows[-1:]).round(2).to_string(index=False, header=len(rows) == 1), flush=True)
    return pd.DataFrame(rows)


def predicted(rates: Rates) -> pd.DataFrame:
    """One row a large model: operations, seconds at these rates, memory."""
    rows = []
    for name, large in LARGE.items():
        fields = (large.hidden, large.intermediate, large.blocks, large.kv, large.parameters)
        expected = predict(*fields, LARGE_TOKENS, 2, rates)
        operations = predict(*fields, LARGE_TOKENS, 2, Rates(1.0, 1.0, float("inf")))
        rows.append(
            {
                "model": name,
                "calibrating_operations": operations.calibrating,
                "fusing_operations": operations.fusing,
                "calibrating_hours": expected.calibrating / 3600,
                "fusing_hours": expected.fusing / 3600,
                "memory_gb": expected.memory / 1e9,
                "model_gb": 2 * large.parameters / 1e9,
                "grams_gb": 4 * large.blocks * (3 * large.hidden**2 + large.intermediate**2) / 1e9,
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Measured points and predicted lines, a panel a sweep."""
    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(11, 3.4), constrained_layout=True)
    for axis, (sweep, part) in zip(axes, table.groupby("sweep", sort=False), strict=True):
        for name, colour in (("calibrating", "#0072B2"), ("fusing", "#D55E00")):
            axis.loglog(part[sweep], part[name], "o", color=colour, label=f"{name}, measured")
            axis.loglog(part[sweep], part[f"predicted_{name}"], "-", color=colour, label=f"{name}, predicted")
        axis.set_xlabel({"hidden": "hidden size", "layers": "blocks", "samples": "samples"}[sweep])
        axis.set_xticks(part[sweep], [str(value) for value in part[sweep]])
        axis.minorticks_off()
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False, fontsize=8)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    chosen.out.mkdir(parents=True, exist_ok=True)
    rates = measure(torch.device("cpu"))
    print(machine())
    print(
        f"rates: {rates.large / 1e9:.0f} and {rates.support / 1e9:.0f} GFLOP/s, copying {rates.copied / 1e9:.1f} GB/s"
    )
    table = measured(rates, chosen.threads)
    table.to_csv(chosen.out / "cost.csv", index=False)
    draw(table, chosen.out / "cost.png")
    models = predicted(rates)
    models.to_csv(chosen.out / "cost_predicted.csv", index=False)
    print(models.to_string(index=False, float_format=lambda value: f"{value:.3g}"))


if __name__ == "__main__":
    main()
