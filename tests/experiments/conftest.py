"""Configurations composed in process, and runs of the whole pipeline at the smallest size that has every part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf, open_dict

from experiments import fusion
from experiments.fuse_config import fusing
from experiments.pipeline import run
from experiments.runs import Run, read_run, recorded
from experiments.schema import Experiment, experiment
from experiments.stages.fuse import REPORT
from tests.experiments.pairs import Done, Fuse

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("colour", "digit", "where", "parity", "occupied")
CAPTIONS = ("caption_in", "caption_near", "caption_out")
SMALL = [
    "logger=none",
    "batch_size=3",
    "model.base.scenes=24",
    *(f"model.base.{phase}.steps=2" for phase in ("vision", "language")),
    *(f"suite.{name}.rows.count=5" for name in (*QUESTIONS, *CAPTIONS)),
    *(f"suite.{name}.train.count=8" for name in (*QUESTIONS, *CAPTIONS)),
    "task.test.rows.count=5",
    "task.train.count=24",
    "task.dev.count=6",
    "training.epochs=1",
    "training.batch_size=8",
    "calibration.samples=12",
    "calibration.held_out=6",
    "calibration.retain_samples=9",
]


def also(task: str) -> list[str]:
    """Overrides for a second target, at its smallest."""
    counts = ("test.rows.count=5", "train.count=24", "dev.count=6")
    return [f"+task@other_tasks.second={task}", *(f"other_tasks.second.{count}" for count in counts)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_hydra() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def parts_of(*overrides: str) -> Experiment:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("run", list(overrides), return_hydra_config=True)
    choices = dict(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    return experiment(composed, choices)


def small(model: str) -> list[str]:
    return [*SMALL, "model.base.align.steps=2"] if model == "digits_instructblip" else SMALL


RunSmall = Callable[..., Run]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all tests, so that what one has built the others reuse."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run_small(home: Path, tmp_path: Path) -> RunSmall:
    """Runs the pipeline at its smallest: ``run_small("digits_llava", "digits_flickr", "baseline=tailor")``."""

    def run_it(model: str, task: str, *overrides: str) -> Run:
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        parts = parts_of(f"model={model}", f"task={task}", *small(model), f"home={home}", *overrides)
        with recorded(folder, seed=parts.seed, choices=dict(parts.choices), overrides=list(overrides)) as record:
            OmegaConf.save(OmegaConf.create(dict(parts.config)), folder / "config.yaml")
            run(parts, folder, record)
        return read_run(folder)

    return run_it


@pytest.fixture
def fuse(tmp_path: Path) -> Fuse:
    """Runs a fusion of given checkpoints in this process: ``fuse("pretrained=…", "finetuned=…", "out=…")``."""

    def fuse_it(*overrides: str) -> Done:
        folder = tmp_path / f"fusion{len(list(tmp_path.glob('fusion*')))}"
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            parts = fusing(compose("fuse", ["threads=1", f"home={tmp_path / 'fusion_home'}", *overrides]))
            with recorded(folder, choices={}, overrides=list(overrides)) as record:
                fusion.run(parts, folder, record)
        return Done(record.content.get("stages", {}), json.loads((folder / REPORT).read_text()))

    return fuse_it
