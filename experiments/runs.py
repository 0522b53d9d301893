"""Run folders: the manifest that says how a run went, and reading finished runs back."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from evaluation.records import Score
from experiments.artifacts import MANIFEST, write_atomically
from experiments.errors import FORESEEN, RunsError

SCORES = "scores.json"


@dataclass(frozen=True)
class Run:
    """A run folder as its files tell."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def finished(self) -> bool:
        return bool(self.manifest["status"] == "finished")

    @property
    def label(self) -> str:
        """The baseline, with what a sweep varied besides."""
        return str(self.manifest["label"])

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
        record.update(status="failed", ended=_now(), error=reason or type(error).__name__)
        raise
    record.update(status="finished", ended=_now())


def read_run(folder: Path) -> Run:
    path = folder / MANIFEST
    try:
        return Run(folder, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise RunsError(f"{path}: cannot be read ({error}); is this the folder of a run?") from error


def read_runs(folder: Path) -> list[Run]:
    """The runs of a sweep's folder in order, or the one run of a run's folder. Raises RunsError if there is none."""
    if (folder / MANIFEST).is_file():
        return [read_run(folder)]
    jobs = sorted(folder.glob(f"*/{MANIFEST}"), key=lambda path: (len(path.parent.name), path.parent.name))
    if not jobs:
        raise RunsError(f"{folder}: holds no run; make one with `python -m experiments.run`")
    return [read_run(path.parent) for path in jobs]


class RememberFolder(Callback):
    """Hydra callback: keeps where the last run or sweep went, for the exit code, which Hydra doesn't take from jobs."""

    folder: Path | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        RememberFolder.folder = Path(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        RememberFolder.folder = Path(config.hydra.sweep.dir)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
