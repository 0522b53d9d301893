"""Fusing given checkpoints, from folders to a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, InstructBlipForConditionalGeneration, LlavaForConditionalGeneration

from experiments.fuse_config import fusing
from experiments.fusion import run
from experiments.runs import recorded
from tailor.checkpoint import Checkpoint
from tests.experiments.conftest import ROOT
from tests.experiments.pairs import FAMILIES, FROZEN, Pair, make_pair

CLASSES = {"llava": LlavaForConditionalGeneration, "instructblip": InstructBlipForConditionalGeneration}
Fuse = Callable[..., dict]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def fuse(tmp_path: Path) -> Fuse:
    """Runs a fusion in this process and returns its report: ``fuse("out=…", "baseline=dare")``."""

    def fuse_it(*overrides: str) -> dict:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            parts = fusing(compose("fuse", [f"home={tmp_path / 'home'}", *overrides]))
            folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
            with recorded(folder, choices={}, overrides=list(overrides)) as record:
                run(parts, folder, record)
        return {"stages": record.content.get("stages", {}), "report": (folder / "fusion_report.json").read_text()}

    return fuse_it


def test_every_family_is_calibrated_and_fused(pair: Pair, fuse: Fuse, tmp_path: Path) -> None:
    fuse(*pair.arguments, f"out={tmp_path / 'out'}", f"calibration.data={pair.samples}", "calibration.held_out=2")
    base, tuned, fused = (Checkpoint(folder) for folder in (pair.pretrained, pair.finetuned, tmp_path / "out"))
    assert list(fused) == list(base)
    for name in base:
        changed = int((base[name] != fused[name]).sum())
        if any(part in name for part in FROZEN):
            assert changed == 0, name
        else:
            assert changed == pytest.approx(0.1 * base[name].numel(), abs=1), name
    loaded = CLASSES.get(pair.family, AutoModelForCausalLM).from_pretrained(tmp_path / "out")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == base.numel
    assert tuned.other_files() == fused.other_files()
