"""Fine-tune, calibrate, fuse, evaluate, log: one run, or a sweep of them with ``-m``.

python -m experiments.run -m experiment=digits_llava_flickr baseline=zero_shot,finetune,tailor sparsity=0.05,0.1
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.artifacts import versions, writing
from experiments.errors import FORESEEN
from experiments.runs import RememberFolder, read_runs, recorded
from experiments.schema import experiment

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="run")
def job(composed: DictConfig) -> None:
    """One job of Hydra. A foreseen error is reported and recorded; its sweep goes on, and the exit code tells."""
    runtime = HydraConfig.get().runtime
    folder = Path(runtime.output_dir)
    try:
        with recorded(folder, choices=dict(runtime.choices), overrides=overrides(), versions=versions()) as record:
            parts = experiment(composed, runtime.choices)
            record.update(seed=parts.seed)
            OmegaConf.save(OmegaConf.create(dict(parts.config)), folder / "config.yaml")
            from experiments.pipeline import run  # torch and transformers only now: composing must stay quick

            with writing(folder):
                run(parts, folder, record)
    except FORESEEN as error:
        log.error("%s", error)


def overrides() -> list[str]:
    """What this job's overrides set besides the choices that name its table and row; seeds are averaged over."""
    told_apart = ("model", "task", "experiment", "baseline", "seed", "logger", "home")
    # "task@other_tasks.second" is a choice of task too.
    return [o for o in HydraConfig.get().overrides.task if re.split("[@=]", o.lstrip("+~"))[0] not in told_apart]


def main() -> None:
    job()
    folder = RememberFolder.folder
    if folder is None:  # --help, --cfg and their like run nothing
        return
    failed = [run for run in read_runs(folder) if not run.finished]
    for run in failed:
        print(f"failed: {run.label} ({run.folder})", file=sys.stderr)
    print(f"runs: {folder}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
