"""A whole fusion of a pair of LLaVA-1.5-7B's shape: calibration of 128 sequences, then exact decoration.

python -m experiments.bench.whole_fuse --device cuda              # 12 blocks and the projector, random weights
python -m experiments.bench.whole_fuse --hidden 512 --intermediate 1376 --blocks 2 --samples 16   # on a CPU

For comparison, in the same process, the loop of SparseGPT: the paper's decorator, each layer reading what the fused
layers below it give.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch

from experiments.bench.llava_pair import LLAVA_7B, Shape, make_pair, make_samples
from experiments.bench.machine import machine
from experiments.bench.measured import Measured, fuse_measured

RUNS = {
    "exact, inputs from the fine-tuned model": ("baseline=tailor_exact",),
    "sparsegpt, sequential inputs": ("baseline=tailor", "calibration.inputs=sequential"),
}
LIMIT_SECONDS, LIMIT_GB = 180, 24


def measure(shape: Shape, samples: int, device: str, memory_gb: float) -> pd.DataFrame:
    """One row a run of `RUNS`: seconds of calibrating, of fusing and of all, and peak memory."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pretrained, finetuned = make_pair(folder, shape)
        data = make_samples(folder / "samples", shape, samples)
        for label, settings in RUNS.items():
            done: Measured = fuse_measured(
                folder / label.partition(",")[0],
                f"pretrained={pretrained}",
                f"finetuned={finetuned}",
                f"calibration.data={data}",
                f"calibration.memory_gb={memory_gb}",
                f"device={device}",
                *settings,
            )
            rows.append({"run": label, **done._asdict()})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=LLAVA_7B.hidden)
    parser.add_argument("--intermediate", type=int, default=LLAVA_7B.intermediate)
    parser.add_argument("--blocks", type=int, default=LLAVA_7B.blocks)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-gb", type=float, default=3.0, help="of Grams held at once")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    chosen = parser.parse_args()
    shape = Shape(chosen.hidden, chosen.intermediate, chosen.blocks)
    table = measure(shape, chosen.samples, chosen.device, chosen.memory_gb)
    chosen.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(chosen.out / "whole_fuse.csv", index=False)
    print(machine())
    print(f"{shape}, {chosen.samples} sequences, {chosen.device}")
    print(table.round(2).to_string(index=False))
    if shape == LLAVA_7B and torch.device(chosen.device).type == "cuda":
        first = table.iloc[0]
        met = first.calibrating + first.fusing <= LIMIT_SECONDS and first.peak_gb <= LIMIT_GB
        print(f"calibrating and fusing within {LIMIT_SECONDS} s and {LIMIT_GB} GB: {'yes' if met else 'no'}")


if __name__ == "__main__":
    main()
