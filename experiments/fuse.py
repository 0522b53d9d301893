"""Fuse two checkpoint folders into a third.

python -m experiments.fuse pretrained=DIR finetuned=DIR out=DIR baseline=tailor_exact sparsity=0.1 \\
    calibration.data=samples.jsonl
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.artifacts import versions, writing
from experiments.errors import FORESEEN
from experiments.fuse_config import fusing
from experiments.runs import RememberFolder, read_runs, recorded

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="fuse")
def job(composed: DictConfig) -> None:
    """One fusion. A foreseen error is reported and recorded, and the exit code tells."""
    config = HydraConfig.get()
    folder, choices = Path(config.runtime.output_dir), dict(config.runtime.choices)
    try:
        with recorded(folder, choices=choices, overrides=list(config.overrides.task), versions=versions()) as record:
            parts = fusing(composed)
            OmegaConf.save(OmegaConf.create(dict(parts.config)), folder / "config.yaml")
            if parts.dry_run:
                from experiments.estimate import show

                show(parts, folder)
                return
            from experiments.fusion import run  # torch and transformers only now: composing must stay quick

            with writing(folder):
                run(parts, folder, record)
    except FORESEEN as error:
        log.error("%s", error)


def main() -> None:
    job()
    folder = RememberFolder.folder
    if folder is not None and not all(run.finished for run in read_runs(folder)):
        sys.exit(1)


if __name__ == "__main__":
    main()
