"""A fusion in this process, with its seconds and its peak memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from experiments.artifacts import peak_memory_gb, reset_peak_memory
from experiments.fuse_config import fusing
from experiments.fusion import run
from experiments.runs import recorded

CONF = Path(__file__).resolve().parents[2] / "conf"


class Measured(NamedTuple):
    """Seconds of passing samples through the model, loading included, of fusing layers, and of all with writing; and
    peak memory in GB: of the accelerator if there is one at work, else of the process."""

    calibrating: float
    fusing: float
    whole: float
    peak_gb: float


def fuse_measured(folder: Path, *overrides: str) -> Measured:
    """Fuses into ``folder`` by overrides of `conf/fuse.yaml`; nothing is reused."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parts = fusing(compose("fuse", [f"home={folder / 'home'}", f"out={folder / 'out'}", *overrides]))
        on_gpu = any(torch.device(name).type == "cuda" for name in parts.devices)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        reset_peak_memory()
        started = time.perf_counter()
        with recorded(folder / "run", choices={}, overrides=[]) as record:
            run(parts, folder / "run", record)
        whole = time.perf_counter() - started
    GlobalHydra.instance().clear()
    stages: dict[str, dict[str, Any]] = record.content.get("stages", {})
    seconds = {
        prefix: sum(stage["seconds"] for name, stage in stages.items() if name.startswith(prefix))
        for prefix in ("plans", "grams", "fused")
    }
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else _process_peak(stages)
    return Measured(seconds["plans"] + seconds["grams"], seconds["fused"], whole, peak)


def _process_peak(stages: dict[str, dict[str, Any]]) -> float:
    """The highest of the stages' peaks, each of which starts counting anew, and of what came after them."""
    return max([peak_memory_gb(), *(stage["peak_memory_gb"] for stage in stages.values())])
