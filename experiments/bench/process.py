"""Run a command as a process of its own, and see what it took."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import ExperimentError

POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Cost:
    """What a process took, from its start to its end.

    ``peak_bytes`` is the kernel's own high-water mark of resident memory, mapped files included; ``anonymous_bytes`` is
    memory that no file backs, as polled.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    anonymous_bytes: int
    output: str


def measure(command: Sequence[str], *, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> Cost:
    """Runs the command to its end. Raises ExperimentError, with the end of its output, if it fails.

    The caller has to be small: a process starts with its parent's high-water mark.
    """
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=cwd
    ) as process:
        anonymous = 0
        while True:
            finished, status, usage = os.wait4(process.pid, os.WNOHANG)
            if finished:
                break
            anonymous = max(anonymous, _anonymous_bytes(process.pid))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise ExperimentError(f"{' '.join(command[:4])} ... failed ({process.returncode}):\n{output[-2000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, anonymous, output)


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
