"""Where finished runs are reported: Weights & Biases, offline unless told otherwise, or nowhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.errors import ConfigError
from experiments.runs import read_run
from experiments.stages.fuse import REPORT

MODES = ("offline", "online")
OLD_TASK_TAG = "old_task_data"


class Tracking(Protocol):
    def log(self, folder: Path) -> None:
        """Reports the scores and the fusion report that a run left in ``folder``."""
        ...


@dataclass(frozen=True)
class NoTracking:
    def log(self, folder: Path) -> None:
        return


@dataclass(frozen=True)
class Wandb:
    """A W&B run for each run. Offline runs are kept in the run folder; ``wandb sync`` sends them later."""

    project: str
    mode: Literal["offline", "online"]
    group: str | None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"logger.mode={self.mode!r} is none of {', '.join(MODES)}")

    def log(self, folder: Path) -> None:
        import wandb
        from omegaconf import OmegaConf

        run = read_run(folder)
        pretrained, targets, summary = run.scores()
        report = json.loads((folder / REPORT).read_text())
        with wandb.init(
            project=self.project,
            mode=self.mode,
            group=self.group or folder.parent.name,
            name=run.label,
            dir=folder,
            config=OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")),
            tags=[OLD_TASK_TAG] if run.sees_old_tasks else [],
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        ) as tracked:
            values = {f"pretrained/{score.benchmark}": score.value for score in pretrained}
            values |= {f"target/{score.benchmark}": score.value for score in targets} | summary
            values |= {f"fusion/{name}": report["totals"][name] for name in ("mask_count", "changed_count")}
            table = wandb.Table(columns=["benchmark", "role", "metric", "value"])
            for role, scores in (("pretrained", pretrained), ("target", targets)):
                for score in scores:
                    table.add_data(score.benchmark, role, score.metric, score.value)
            layers = wandb.Table(columns=["name", "fate", "numel", "mask_count", "changed_count", "error"])
            for row in report["tensors"]:
                layers.add_data(*(row[column] for column in layers.columns[:-1]), _error(row))
            tracked.log({**values, "scores": table, "fusion_report": layers})


def _error(row: dict[str, Any]) -> float | None:
    return row["errors"]["calibration"]["rounded"] if row["errors"] else None
