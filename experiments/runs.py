"""Run folders: the manifest that says how a run went, and reading finished runs back."""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from evaluation.records import Score
from experiments.artifacts import MANIFEST, Artifact, Store, write_atomically
from experiments.errors import FORESEEN, RunsError

log = logging.getLogger(__name__)
SCORES = "scores.json"


@dataclass(frozen=True)
class Run:
    """A run folder as its files tell. ``label``: the baseline and what sets it apart from the runs read with it."""

    folder: Path
    manifest: dict[str, Any]
    label: str

    @property
    def finished(self) -> bool:
        return bool(self.manifest["status"] == "finished")

    def scores(self) -> tuple[list[Score], Score, dict[str, float]]:
        """(pretrained, target, {average, h_score}). Raises RunsError."""
        path = self.folder / SCORES
        try:
            stored = json.loads(path.read_text())
            pretrained = [Score.from_json(score) for score in stored["pretrained"]]
            return pretrained, Score.from_json(stored["target"]), stored["summary"]
        except (OSError, ValueError, KeyError) as error:
            raise RunsError(f"{path}: cannot be read ({error!r}); run it again") from error


@dataclass
class Record:
    """The manifest of a run under way; every change reaches the disk at once."""

    folder: Path
    content: dict[str, Any]

    def update(self, **changes: Any) -> None:
        self.content.update(changes)
        write_atomically(self.folder / MANIFEST, json.dumps(self.content, indent=1) + "\n")


@dataclass(frozen=True)
class Builds:
    """A store of artifacts whose every use is noted in a run's record, and told."""

    store: Store
    record: Record
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def build(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        modules: Iterable[str],
        make: Callable[[Path], None],
        label: str | None = None,
    ) -> Artifact:
        """`Store.build`. ``label`` names it in the record, where a run builds several of one stage."""
        artifact = self.store.build(stage, inputs, modules, make)
        with self._lock:
            self.record.content.setdefault("stages", {})[label or stage] = {
                "key": artifact.key,
                "reused": artifact.reused,
                "seconds": artifact.seconds,
                "peak_memory_gb": artifact.peak_memory_gb,
            }
            self.record.update()
        how = "reused" if artifact.reused else f"{artifact.seconds:.1f} s"
        log.info("%-24s %s %s", label or stage, artifact.key, how)
        return artifact


@contextmanager
def recorded(folder: Path, **content: Any) -> Iterator[Record]:
    """Keeps a run's manifest: ``running`` until the block ends, then ``finished``, else ``failed`` with the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder, {"status": "running", "started": _now(), **content})
    record.update()
    try:
        yield record
    except BaseException as error:
        reason = str(error) if isinstance(error, FORESEEN) else traceback.format_exc()
        with suppress(OSError):  # on a full disk it stays "running", which no table takes for finished either
            record.update(status="failed", ended=_now(), error=reason or type(error).__name__)
        raise
    record.update(status="finished", ended=_now())


def read_run(folder: Path) -> Run:
    """The run of a run's folder, labelled by its baseline and overrides. Raises RunsError."""
    manifest = _manifest(folder)
    return Run(folder, manifest, _label(manifest, shared=set()))


def read_runs(folder: Path) -> list[Run]:
    """The runs of a sweep's folder in order, or the one run of a run's folder. Raises RunsError if there is none.

    Labels leave out the overrides that all these runs share.
    """
    if (folder / MANIFEST).is_file():
        return [read_run(folder)]
    jobs = sorted(folder.glob(f"*/{MANIFEST}"), key=lambda path: (len(path.parent.name), path.parent.name))
    if not jobs:
        raise RunsError(f"{folder}: holds no run; make one with `python -m experiments.run`")
    manifests = [_manifest(path.parent) for path in jobs]
    shared = set.intersection(*(set(manifest["overrides"]) for manifest in manifests))
    return [Run(path.parent, each, _label(each, shared)) for path, each in zip(jobs, manifests, strict=True)]


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunsError(f"{path}: cannot be read ({error}); is this the folder of a run?") from error
    if missing := [name for name in ("status", "choices", "overrides") if name not in manifest]:
        raise RunsError(f"{path}: lacks {', '.join(missing)}; no run of this version wrote it: run it again")
    return manifest


def _label(manifest: dict[str, Any], shared: set[str]) -> str:
    return " ".join([manifest["choices"]["baseline"], *(o for o in manifest["overrides"] if o not in shared)])


class RememberFolder(Callback):
    """Hydra callback: keeps where the last run or sweep went, for the exit code, which Hydra doesn't take from jobs.

    Makes the folder first: where it can't, Hydra itself would end in a traceback.
    """

    folder: Path | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        self._open(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self._open(Path(config.hydra.sweep.dir))

    @staticmethod
    def _open(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            # Hydra turns any other exception of a callback into a warning.
            sys.exit(f"error: {folder}: {error.strerror}; point TAILOR_HOME to a folder that can be written")
        RememberFolder.folder = folder


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
