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
OLD_TASK_MARK = "†"
OLD_TASK_NOTE = f"{OLD_TASK_MARK} also saw training samples of the pretrained benchmarks"


@dataclass(frozen=True)
class Run:
    """A run folder as its files tell. ``label``: the baseline and what sets it apart from the runs read with it."""

    folder: Path
    manifest: dict[str, Any]
    label: str

    @property
    def finished(self) -> bool:
        return bool(self.manifest["status"] == "finished")

    @property
    def sees_old_tasks(self) -> bool:
        """Whether the method learnt from samples of the pretrained benchmarks as well. Raises RunsError."""
        return bool(self._told("sees_old_tasks"))

    @property
    def table(self) -> tuple[str, str]:
        """The model and the task, or all targets where there are several: what a table is about. Raises RunsError."""
        choices, targets = self.manifest["choices"], self._told("targets")
        return choices["model"], choices["task"] if len(targets) == 1 else " + ".join(sorted(targets))

    @property
    def method(self) -> str:
        """``label`` and, where only some of several targets were learnt, which. Raises RunsError."""
        targets, learnt = self._told("targets"), self._told("learnt_targets")
        return f"{self.label} ({', '.join(learnt)})" if 0 < len(learnt) < len(targets) else self.label

    def scores(self) -> tuple[list[Score], list[Score], dict[str, float]]:
        """(pretrained, targets, {average, h_score}); the first target is `task`. Raises RunsError."""
        path = self.folder / SCORES
        try:
            stored = json.loads(path.read_text())
            pretrained = [Score.from_json(score) for score in stored["pretrained"]]
            return pretrained, [Score.from_json(score) for score in stored["targets"]], stored["summary"]
        except (OSError, ValueError, KeyError) as error:
            raise RunsError(f"{path}: cannot be read ({error!r}); run it again") from error

    def _told(self, name: str) -> Any:
        return _require(self.manifest, self.folder / MANIFEST, name)[name]


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


def read_runs(*folders: Path) -> list[Run]:
    """The runs of sweeps' folders in order, or the one run of a run's folder. Raises RunsError if there is none in one.

    Labels leave out the overrides that all these runs share.
    """
    if len(folders) == 1 and (folders[0] / MANIFEST).is_file():
        return [read_run(folders[0])]
    jobs = [job for folder in folders for job in _jobs(folder)]
    manifests = [_manifest(job) for job in jobs]
    shared = set.intersection(*(set(manifest["overrides"]) for manifest in manifests))
    return [Run(job, each, _label(each, shared)) for job, each in zip(jobs, manifests, strict=True)]


def marked(name: str, sees_old_tasks: bool) -> str:
    """``name`` as it is shown: with the mark of `OLD_TASK_NOTE` if that holds for it."""
    return f"{name} {OLD_TASK_MARK}" if sees_old_tasks else name


def _jobs(folder: Path) -> list[Path]:
    if (folder / MANIFEST).is_file():
        return [folder]
    jobs = [path.parent for path in folder.glob(f"*/{MANIFEST}")]
    if not jobs:
        raise RunsError(f"{folder}: holds no run; make one with `python -m experiments.run`")
    return sorted(jobs, key=lambda job: (len(job.name), job.name))


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunsError(f"{path}: cannot be read ({error}); is this the folder of a run?") from error
    return _require(manifest, path, "status", "choices", "overrides")


def _require(manifest: dict[str, Any], path: Path, *names: str) -> dict[str, Any]:
    if missing := [name for name in names if name not in manifest]:
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
