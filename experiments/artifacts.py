"""Expensive results by the hash of everything that went into them: built once, whole or not at all, reused ever after.

`<home>/artifacts/<stage>/<key>/` holds what a stage wrote and a `manifest.json`. A stage writes into a hidden folder
beside it, which is renamed when the stage is done; a lock lets one job build while the others wait.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError

from experiments.errors import ArtifactError
from experiments.sources import source_hash

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "accelerate"),
    *("datasets", "numpy", "pillow", "scikit-learn"),
)
KEY_LENGTH = 16
HASHED_BYTES = 2**26
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class Artifact:
    """A whole result: its folder, whether this run found it ready, and what building it took."""

    stage: str
    key: str
    folder: Path
    reused: bool
    seconds: float
    peak_memory_gb: float


@dataclass(frozen=True)
class Store:
    """Artifacts under ``home``. ``common`` is part of every key: settings that change bits, such as the threads."""

    home: Path
    common: Mapping[str, Any] = field(default_factory=dict)

    def build(
        self, stage: str, inputs: Mapping[str, Any], modules: Iterable[str], make: Callable[[Path], None]
    ) -> Artifact:
        """The artifact of ``inputs``; calls ``make(folder)`` to fill it unless it is there already.

        ``modules`` are those whose code, with all that they import, decides the result.
        Raises ArtifactError if it can't be written or was changed after it was built.
        """
        record = {
            "stage": stage,
            "inputs": inputs,
            "common": dict(self.common),
            "code": source_hash(modules),
            "versions": versions(),
        }
        key = hashlib.sha256(canonical(record)).hexdigest()[:KEY_LENGTH]
        folder = self.home / "artifacts" / stage / key
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
        with lock:
            if folder.exists():
                manifest = _verified(folder)
                return Artifact(stage, key, folder, True, manifest["seconds"], manifest["peak_memory_gb"])
            return self._make(stage, key, folder, record, make)

    @staticmethod
    def _make(stage: str, key: str, folder: Path, record: Mapping[str, Any], make: Callable[[Path], None]) -> Artifact:
        partial = folder.with_name(f".{key}.partial")
        started = time.perf_counter()
        reset_peak_memory()
        try:
            with writing(folder):
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed run; the lock says that nobody is at it
                partial.mkdir()
                make(partial)
                seconds, memory = round(time.perf_counter() - started, 3), peak_memory_gb()
                files = {name: _fingerprint(path) for name, path in _files(partial).items()}
                manifest = {**record, "key": key, "seconds": seconds, "peak_memory_gb": memory, "files": files}
                (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Artifact(stage, key, folder, False, seconds, memory)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide bits."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def canonical(value: object) -> bytes:
    """JSON with sorted keys, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def reset_peak_memory() -> None:
    """Makes `peak_memory_gb` count from now on, where Linux lets it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Highest resident memory of this process since `reset_peak_memory`, in GB."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        return round(int(kib) * 1024 / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns the errors of a disk that is full or can't be written into an ArtifactError about ``place``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports the number of the system's error in its text alone.
        found = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number not in UNWRITABLE:
            raise
        raise ArtifactError(
            f"{place}: {os.strerror(number)}; free some space or point TAILOR_HOME to a folder that can be written, "
            "and start again"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in one step, so that no reader ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _lock(folder: Path) -> AcquireReturnProxy:
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        return lock.acquire(timeout=0.2)
    except Timeout:
        log.info("waiting for another job that builds %s", folder)
        return lock.acquire()


def _verified(folder: Path) -> dict[str, Any]:
    way_out = f"delete {folder} and start again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / MANIFEST}: cannot be read ({error}); {way_out}") from error
    found = {name: _fingerprint(path) for name, path in _files(folder).items() if name != MANIFEST}
    if damaged := sorted(name for name, expected in manifest["files"].items() if found.get(name) != expected):
        raise ArtifactError(f"{folder}: {', '.join(damaged)} changed since it was written; {way_out}")
    return manifest


def _fingerprint(path: Path) -> str:
    """Size and sha256; of files too large to be read at every use the size alone."""
    size = path.stat().st_size
    return f"{size} {hashlib.sha256(path.read_bytes()).hexdigest()}" if size <= HASHED_BYTES else str(size)


def _files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
