"""The machine and versions behind a measurement."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """One line: processor, cores and threads in use, graphics card if there is one, versions."""
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join(
        [
            _processor(),
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
            *cards,
            f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}",
        ]
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
