"""DARE and WiSE-FT against mergekit on the same checkpoints: ``python -m experiments.bench.mergekit``.

Makes a pair of random bfloat16 checkpoints of a LLaMA's shapes. Ours (``tailor.fuse.fuse``) and mergekit's
``dare_linear`` and ``linear`` then take turns on it, each as a process of its own that is timed from start to end. Both
read and write safetensors, in shards of the same limit. mergekit has an environment of its own, which is made if
``--mergekit-python`` names none. It is given the options that help without an accelerator, and none that help only with
one (``--low-cpu-memory`` keeps tensors there) or buy speed with memory (``--async-write``).

``--ours`` replaces our side by another command, such as
``"python my_fuse.py {base} {finetuned} {method} {shard} {out}"``; method is dare or wise_ft, shard a number of bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.bench.machine import machine
from experiments.bench.pair import of_size
from experiments.bench.process import Cost, measure
from experiments.bench.table import print_table, write_table
from experiments.errors import FORESEEN, ExperimentError
from tailor.sizes import parse_bytes

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ("mergekit==0.1.5", "torch==2.13.0")
OPTIONS = ("--quiet", "--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card")
SPARSITY = 0.1
ALPHA = 0.5
IMPORTS = """
import sys, time
from tailor.fuse import fuse
from tailor.methods.dare import Dare
from tailor.methods.wise_ft import WiseFT
"""
OURS = f"""{IMPORTS}
base, finetuned, method, shard, out = sys.argv[1:]
chosen = {{"dare": Dare({SPARSITY}), "wise_ft": WiseFT({ALPHA})}}[method]
started = time.perf_counter()
fuse(base, finetuned, chosen, out, max_shard_bytes=int(shard))
print("inside", time.perf_counter() - started)
"""


def recipe(method: str, base: Path, finetuned: Path) -> str:
    """What mergekit is to do, as JSON, which is YAML too."""
    if method == "dare":
        models = [{"model": str(finetuned), "parameters": {"weight": 1.0, "density": SPARSITY}}]
        return json.dumps(
            {"merge_method": "dare_linear", "base_model": str(base), "models": models, "dtype": "bfloat16"}
        )
    shares = {base: 1 - ALPHA, finetuned: ALPHA}
    models = [{"model": str(path), "parameters": {"weight": share}} for path, share in shares.items()]
    return json.dumps({"merge_method": "linear", "models": models, "dtype": "bfloat16"})


def compare(
    folder: Path, gigabytes: float, repeats: int, shard_bytes: int, mergekit: Path, ours: str | None
) -> dict[tuple[str, str], list[Cost]]:
    """(method, whose) -> costs, alternating between the two. Leaves the last outputs as ``<method>_<whose>``."""
    shape = of_size(gigabytes)
    code = "import sys; from pathlib import Path; from experiments.bench.pair import *; "
    measure([sys.executable, "-c", code + f"write_pair(Path(sys.argv[1]), {shape!r})", str(folder)], cwd=ROOT)
    base, finetuned = folder / "base", folder / "finetuned"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    costs: dict[tuple[str, str], list[Cost]] = {}
    for repeat in range(repeats):
        for method in ("dare", "wise_ft"):
            config = folder / f"{method}.yaml"
            config.write_text(recipe(method, base, finetuned))
            outs = {whose: folder / f"{method}_{whose}" for whose in ("ours", "mergekit")}
            commands = {
                "ours": our_command(ours, base, finetuned, method, shard_bytes, outs["ours"]),
                "mergekit": [
                    *(str(mergekit.with_name("mergekit-yaml")), str(config), str(outs["mergekit"])),
                    *("--out-shard-size", str(shard_bytes), *OPTIONS),
                ],
            }
            for whose in commands if repeat % 2 == 0 else reversed(commands):
                shutil.rmtree(outs[whose], ignore_errors=True)
                cost = measure(commands[whose], environment=offline, cwd=ROOT)
                costs.setdefault((method, whose), []).append(cost)
                print(f"{method} {whose}: {cost.seconds:.1f} s, {cost.peak_bytes / 1e9:.2f} GB", file=sys.stderr)
    return costs


def our_command(
    template: str | None, base: Path, finetuned: Path, method: str, shard_bytes: int, out: Path
) -> list[str]:
    """The command of our side: ``tailor.fuse.fuse`` alone, or what a template says."""
    if template is None:
        return [sys.executable, "-c", OURS, str(base), str(finetuned), method, str(shard_bytes), str(out)]
    places = {"base": base, "finetuned": finetuned, "method": method, "shard": shard_bytes, "out": out}
    return [part.format(**places) for part in shlex.split(template)]


def start_seconds(mergekit: Path) -> Mapping[str, float]:
    """Seconds that each side takes before it does anything: interpreter and imports."""
    return {
        "ours": measure([sys.executable, "-c", IMPORTS], cwd=ROOT).seconds,
        "mergekit": measure([str(mergekit.with_name("mergekit-yaml")), "--help"]).seconds,
    }


def largest_difference(one: Path, other: Path) -> tuple[float, float, float]:
    """Of two checkpoints: largest absolute difference, largest in bfloat16 steps, and share of unequal entries."""
    import torch

    from tailor.checkpoint import Checkpoint
    from tailor.chunks import chunks

    first, second = Checkpoint(one), Checkpoint(other)
    if set(first) != set(second):
        raise ExperimentError("the two outputs do not hold the same tensors")
    largest = steps = 0.0
    unequal = total = 0
    for name in first:
        for a, b in chunks(first[name], second[name]):
            difference = (a.float() - b.float()).abs()
            spacing = torch.maximum(a.abs(), b.abs()).float().log2().floor().exp2() / 2**7
            largest = max(largest, float(difference.max()))
            steps = max(steps, float(torch.where(difference > 0, difference / spacing, 0).max()))
            unequal += int(difference.count_nonzero())
            total += a.numel()
    return largest, steps, unequal / total


def make_environment(folder: Path) -> Path:
    """The interpreter of mergekit's environment, which is made if it is not there."""
    python = folder / "bin" / "python"
    if not python.with_name("mergekit-yaml").is_file():
        print(f"making {folder} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python


def rows(costs: Mapping[tuple[str, str], Sequence[Cost]], start: Mapping[str, float]) -> list[dict[str, object]]:
    """One row for each method and side: medians over the repeats, largest peaks."""
    table: list[dict[str, object]] = []
    for (method, whose), several in costs.items():
        peer = costs[method, "mergekit"]
        ratios = [ours.seconds / theirs.seconds for ours, theirs in zip(several, peer, strict=True)]
        inside = [float(cost.output.split()[-1]) for cost in several if cost.output.startswith("inside")]
        table.append(
            {
                "method": method,
                "whose": whose,
                "seconds": round(statistics.median(cost.seconds for cost in several), 2),
                "fastest": round(min(cost.seconds for cost in several), 2),
                "cpu_seconds": round(statistics.median(cost.cpu_seconds for cost in several), 2),
                "start_seconds": round(start[whose], 2),
                "inside_seconds": round(statistics.median(inside), 2) if inside else "",
                "peak_gb": round(max(cost.peak_bytes for cost in several) / 1e9, 3),
                "anonymous_gb": round(max(cost.anonymous_bytes for cost in several) / 1e9, 3),
                "time_ratio": round(statistics.median(ratios), 3),
                "peak_ratio": round(max(c.peak_bytes for c in several) / max(c.peak_bytes for c in peer), 3),
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench.mergekit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size-gb", type=float, default=1, help="of each checkpoint, in 10⁹ bytes (1)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side (3)")
    parser.add_argument("--shard-size", default="5GB", help="largest file of weights, for both sides (5GB)")
    parser.add_argument("--mergekit-python", type=Path, help="interpreter of an environment that has mergekit")
    parser.add_argument("--ours", help="a command with places for {base} {finetuned} {method} {shard} {out}")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench", help="folder of mergekit.csv")
    chosen = parser.parse_args()
    try:
        shard_bytes = parse_bytes(chosen.shard_size, "--shard-size")
        mergekit = chosen.mergekit_python or make_environment(ROOT / "outputs" / "bench" / "venv-mergekit")
        chosen.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=chosen.out) as temporary:
            folder = Path(temporary)
            costs = compare(folder, chosen.size_gb, chosen.repeats, shard_bytes, mergekit, chosen.ours)
            table = rows(costs, start_seconds(mergekit))
            difference = largest_difference(folder / "wise_ft_ours", folder / "wise_ft_mergekit")
    except FORESEEN as error:
        sys.exit(f"error: {error}")
    write_table(chosen.out / "mergekit.csv", table)
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    print(f"{of_size(chosen.size_gb).numel * 2 / 1e9:.2f} GB a checkpoint, {chosen.repeats} turns, {' '.join(OPTIONS)}")
    print_table(table)
    largest, steps, share = difference
    print(f"WiSE-FT and linear differ by {largest:.3g} at most, {steps:.3g} bfloat16 steps, in {share:.3%} of entries")


if __name__ == "__main__":
    main()
