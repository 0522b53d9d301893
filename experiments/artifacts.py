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
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.errors import ArtifactError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn", "pillow", "accelerate")
KEY_LENGTH = 16
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
REPOSITORY = Path(__file__).resolve().parent.parent
# Read when the process starts: what a file says hours later is not the code that runs.
_CODE = {
    str(path.relative_to(REPOSITORY)): hashlib.sha256(path.read_bytes()).hexdigest()
    for package in ("tailor", "evaluation", "experiments")
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}


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
        self, stage: str, inputs: Mapping[str, Any], sources: Sequence[str], make: Callable[[Path], None]
    ) -> Artifact:
        """The artifact of ``inputs``; calls ``make(folder)`` to fill it unless it is there already.

        ``sources`` are the files and folders, relative to the repository, whose code decides the result.
        Raises ArtifactError if the home can't be written or the artifact was changed after it was built.
        """
        record = {
            "stage": stage,
            "inputs": inputs,
            "common": dict(self.common),
            "sources": source_hash(sources),
            "versions": versions(),
        }
        key = hashlib.sha256(canonical(record)).hexdigest()[:KEY_LENGTH]
        folder = self.home / "artifacts" / stage / key
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if folder.exists():
                    manifest = _verified(folder)
                    return Artifact(stage, key, folder, True, manifest["seconds"], manifest["peak_memory_gb"])
                return self._make(stage, key, folder, record, make)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise ArtifactError(
                f"{error.filename or folder}: {error.strerror or error}; "
                "free some space or point TAILOR_HOME to a folder that can be written, and start again"
            ) from error

    @staticmethod
    def _make(stage: str, key: str, folder: Path, record: Mapping[str, Any], make: Callable[[Path], None]) -> Artifact:
        partial = folder.with_name(f".{key}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run; the lock says that nobody is at it
        partial.mkdir()
        started = time.perf_counter()
        try:
            make(partial)
            seconds, memory = round(time.perf_counter() - started, 3), peak_memory_gb()
            files = {name: path.stat().st_size for name, path in _files(partial).items()}
            manifest = {**record, "key": key, "seconds": seconds, "peak_memory_gb": memory, "files": files}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Artifact(stage, key, folder, False, seconds, memory)


def source_hash(sources: Sequence[str]) -> str:
    """sha256 over the Python files at ``sources``, files or folders given relative to the repository."""
    digest = hashlib.sha256()
    for source in sorted(sources):
        found = {name: code for name, code in _CODE.items() if name == source or name.startswith(f"{source}/")}
        if not found:
            raise FileNotFoundError(f"source {source} is not in {REPOSITORY}")
        for name, code in found.items():
            digest.update(f"{name}\0{code}\0".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide bits."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def canonical(value: object) -> bytes:
    """JSON with sorted keys, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def peak_memory_gb() -> float:
    """Highest resident memory of this process so far, in GB (Linux counts in KiB)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def write_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in one step, so that no reader ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _locked(folder: Path) -> FileLock:
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
    found = {name: path.stat().st_size for name, path in _files(folder).items() if name != MANIFEST}
    if damaged := sorted(name for name, size in manifest["files"].items() if found.get(name) != size):
        raise ArtifactError(f"{folder}: {', '.join(damaged)} changed since it was written; {way_out}")
    return manifest


def _files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
