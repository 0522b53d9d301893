"""What only a machine with a GPU can show: ``pytest -m gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.bench.llava_pair import Shape
from experiments.bench.whole_fuse import RUNS, measure
from tailor.decorate import decorate, layer_error
from tailor.linalg import inverse_factor
from tests.experiments.pairs import FAMILIES, Fuse, make_pair

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("how", ["sparsegpt", "exact"])
def test_decorators_agree_with_the_cpu(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(300, 200, generator=generator)
    inputs = torch.randn(1000, 200, generator=generator) @ torch.randn(200, 200, generator=generator)
    gram = 2 / 1000 * inputs.T @ inputs
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    mask = torch.rand(300, 200, generator=generator) < 0.1
    there = decorate(delta.cuda(), mask.cuda(), gram.cuda(), how, factor=inverse_factor(gram.cuda()))
    here = decorate(delta.double(), mask, gram.double(), how)
    assert there.device.type == "cuda"
    assert layer_error(delta, there.cpu(), gram) == pytest.approx(layer_error(delta, here.float(), gram), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fusion_chooses_what_it_chooses_on_the_cpu(family: str, fuse: Fuse, tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair", family)
    settings = (*pair.arguments, f"calibration.data={pair.samples}", "dtype=float32")
    here, there = (fuse(*settings, f"device={device}", f"out={tmp_path / device}").report for device in ("cpu", "cuda"))
    errors = [
        {row["name"]: row["errors"]["calibration"]["exact"] for row in report["tensors"] if row["errors"]}
        for report in (here, there)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    assert here["totals"]["mask_count"] == there["totals"]["mask_count"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_the_layers(fuse: Fuse, tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair", "llama")
    settings = (*pair.arguments, f"calibration.data={pair.samples}")
    one, two = (
        fuse(*settings, f"device={device}", f"out={tmp_path / str(number)}").report["totals"]
        for number, device in enumerate(("cuda:0", "[cuda:0,cuda:1]"))
    )
    assert one["mask_count"] == two["mask_count"]


def test_a_whole_fusion_is_measured_on_the_gpu() -> None:
    table = measure(Shape(hidden=512, intermediate=1376, blocks=2), 16, "cuda", 3.0)
    assert list(table["run"]) == list(RUNS)
    assert (table["peak_gb"] > 0).all()
