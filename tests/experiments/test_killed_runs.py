"""A run killed in any stage, started again, goes on from the last whole stage."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from experiments.runs import read_run
from tests.experiments.conftest import RunSmall

ORDER = ["base", "finetuned", "grams", "fused", "answers/caption-in"]
# Where the child dies: half way through each stage, after something was written or just before.
INSIDE = {
    "base": "experiments.stages.pretrain.save",
    "finetuned": "experiments.stages.finetune.Trainer.train",
    "grams": "tailor.gram.Grams.save",
    "fused": "tailor.patch.Patch.save",
    "answers/caption-in": "experiments.pipeline.write_predictions",
}


@pytest.mark.skipif(sys.platform == "win32", reason="kills a forked child")
@pytest.mark.parametrize("stage", ORDER)
def test_a_killed_run_goes_on(run_small: RunSmall, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own_home = f"home={tmp_path / 'own'}"
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(INSIDE[stage], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        try:
            run_small("digits_llava", "digits_flickr", "baseline=tailor", own_home)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert read_run(tmp_path / "run0").manifest["status"] == "running"

    again = run_small("digits_llava", "digits_flickr", "baseline=tailor", own_home)
    assert again.finished
    stages = again.manifest["stages"]
    done = ORDER[: ORDER.index(stage)]
    assert [name for name in ORDER if stages[name]["reused"]] == done
    assert not list((tmp_path / "own").rglob("*.partial"))
