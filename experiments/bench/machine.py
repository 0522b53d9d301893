"""The machine and versions behind a measurement."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    """One line: processor, cores and threads in use, memory, graphics cards, versions."""
    import torch  # here, since what measures other processes must be small itself

    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "safetensors", "transformers"))
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB"
    return ", ".join([_processor(), cores, *cards, f"Python {platform.python_version()}, {versions}"])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
