"""A model fused by halves, in processes of their own, is the model fused at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tailor.checkpoint import Checkpoint, CheckpointWriter
from tailor.fuse import fuse
from tailor.methods.dare import Dare
from tailor.methods.tailor import Tailor
from tailor.patch import Patch
from tests.tailor.conftest import Model

ROOT = Path(__file__).resolve().parents[2]
HALVES = (["first.*", "embed.*"], ["second.*", "norm.*"])
CODE = """
import json, sys, torch
from tailor.fuse import fuse_to_patch
from tailor.gram import Grams
from tailor.method import GramEvidence
from tailor.methods.dare import Dare
from tailor.methods.tailor import Tailor
torch.set_num_threads(1)
folder, scope, method, patch = sys.argv[1:]
evidence = GramEvidence(Grams.load(folder + "/grams")) if method.startswith("Tailor") else None
fuse_to_patch(
    folder + "/base", folder + "/tuned", eval(method), scope=json.loads(scope), evidence=evidence, seed=3
)[0].save(patch)
"""


@pytest.mark.parametrize("method", [Dare(0.3), Tailor(0.3, decorator="exact")], ids=["dare", "tailor"])
def test_halves_add_up_bit_for_bit(
    tmp_path: Path, make_model: Callable[..., Model], write_checkpoint: Callable[..., Path], method: Dare | Tailor
) -> None:
    model = make_model(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", model.pretrained, shards=2)
    tuned = write_checkpoint(tmp_path / "tuned", model.finetuned)
    model.evidence.calibration.save(tmp_path / "grams")
    halves = [tmp_path / "one", tmp_path / "two"]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(tmp_path), repr(scope).replace("'", '"'), repr(method), str(out)], cwd=ROOT
        )
        for scope, out in zip(HALVES, halves, strict=True)
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    evidence = model.evidence if isinstance(method, Tailor) else None
    fuse(base, tuned, method, tmp_path / "whole", scope=[*HALVES[0], *HALVES[1]], evidence=evidence, seed=3)

    for order in (halves, halves[::-1]):
        stacked = Patch.load(order[1]).applied(Patch.load(order[0]).applied(Checkpoint(base)))
        out = tmp_path / f"stacked_{order[0].name}"
        with CheckpointWriter(out, tuned) as writer:
            for name in stacked:
                writer.write(name, stacked[name])
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
        assert all(not Patch.load(path).unlike(Checkpoint(base)) for path in order)
