"""Time and memory of fusing against the size of the model: ``python -m experiments.bench.scaling``.

Two pairs of random bfloat16 checkpoints, the second with twice as many layers of the same shapes, so that the largest
tensor is the same. Each fusion is a process of its own, on one thread: two that wait for each other on cores with other
work to do take several times longer, now and then. Time, imports left out, should double, and peak memory stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

from experiments.bench.machine import machine
from experiments.bench.pair import Shape
from experiments.bench.process import Cost, measure
from experiments.bench.table import print_table, write_table
from experiments.errors import FORESEEN

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("dare", "magnitude", "tailor_exact")
STREAMED = Shape(layers=8, hidden=1024, inner=2816, vocabulary=1000)
# The exact decorator solves a system for every row: cubic in the kept inputs, so its layers are smaller.
SOLVED = Shape(layers=8, hidden=256, inner=512, vocabulary=250)
FUSE = """
import shutil, sys, time
from pathlib import Path
from tailor.fuse import fuse
from tailor.gram import Grams
from tailor.method import GramEvidence
from tailor.methods.dare import Dare
from tailor.methods.magnitude import Magnitude
from tailor.methods.tailor import Tailor
base, finetuned, method, out = sys.argv[1:]
methods = {"dare": Dare(0.1), "magnitude": Magnitude(0.1), "tailor_exact": Tailor(0.1, decorator="exact")}
grams = Path(base).with_name("grams")
evidence = GramEvidence(Grams.load(grams)) if method == "tailor_exact" else None
started = time.perf_counter()
fuse(base, finetuned, methods[method], out, evidence=evidence)
print("inside", time.perf_counter() - started)
"""
MAKE = """
import sys
from pathlib import Path
import torch
from experiments.bench.pair import Shape, write_pair
from tailor.gram import GramAccumulator, Grams
folder, shape, with_grams = Path(sys.argv[1]), eval(sys.argv[2]), sys.argv[3] == "True"
write_pair(folder, shape)
if with_grams:
    generator = torch.Generator().manual_seed(1)
    layers, sums = {}, {}
    for name, size in shape.tensors():
        if name.endswith("_proj.weight"):
            layers[name] = name
            sums[name] = GramAccumulator(name)
            sums[name].add(torch.randn(2 * size[1], size[1], generator=generator))
    Grams.collect(layers, sums).save(folder / "grams")
"""


def compare(folder: Path, method: str, repeats: int) -> list[dict[str, object]]:
    """A row for the model and one for that of twice the layers: shortest times, largest peaks; they take turns."""
    single = SOLVED if method == "tailor_exact" else STREAMED
    shapes = (single, dataclasses.replace(single, layers=2 * single.layers))
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    costs: dict[Shape, list[Cost]] = {shape: [] for shape in shapes}
    for shape in shapes:
        place = folder / f"{method}_{shape.layers}"
        measure([sys.executable, "-c", MAKE, str(place), repr(shape), str(method == "tailor_exact")], cwd=ROOT)
    for repeat in range(repeats):
        for shape in shapes:
            place = folder / f"{method}_{shape.layers}"
            arguments = (str(place / "base"), str(place / "finetuned"), method, str(place / f"out_{repeat}"))
            costs[shape].append(measure([sys.executable, "-c", FUSE, *arguments], environment=one_thread, cwd=ROOT))
    table: list[dict[str, object]] = []
    for shape, several in costs.items():
        peak, peak_of_single = (max(cost.peak_bytes for cost in of) for of in (several, costs[single]))
        table.append(
            {
                "method": method,
                "layers": shape.layers,
                "checkpoint_gb": round(shape.numel * 2 / 1e9, 3),
                "seconds": round(fastest(several), 2),
                "peak_gb": round(peak / 1e9, 3),
                "anonymous_gb": round(max(cost.anonymous_bytes for cost in several) / 1e9, 3),
                "size_ratio": round(shape.numel / single.numel, 3),
                "time_ratio": round(fastest(several) / fastest(costs[single]), 3),
                "peak_ratio": round(peak / peak_of_single, 3),
            }
        )
    return table


def fastest(costs: list[Cost]) -> float:
    """Seconds of the fusion itself, without the interpreter's start and imports, when least disturbed."""
    return min(float(cost.output.split()[-1]) for cost in costs)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns of each size (3)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench", help="folder of scaling.csv")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    table: list[dict[str, object]] = []
    try:
        for method in METHODS:
            with tempfile.TemporaryDirectory(dir=chosen.out) as folder:
                table += compare(Path(folder), method, chosen.repeats)
    except FORESEEN as error:
        sys.exit(f"error: {error}")
    write_table(chosen.out / "scaling.csv", table)
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    print_table(table)


if __name__ == "__main__":
    main()
