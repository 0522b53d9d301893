"""Measurements at the smallest size: that they run and add up, never how long they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.bench import cost, pair, whole_fuse
from experiments.bench.llava_pair import Shape
from experiments.cost import Rates
from tailor.checkpoint import Checkpoint


def test_a_whole_fusion_is_measured() -> None:
    table = whole_fuse.measure(Shape(hidden=64, intermediate=96, blocks=1), 2, "cpu", 1e-5)
    assert list(table["run"]) == list(whole_fuse.RUNS)
    assert (table["whole"] >= table["calibrating"] + table["fusing"]).all()


def test_predictions_grow_with_the_model() -> None:
    table = cost.predicted(Rates(1e12, 1e11, 1e10)).set_index("model")
    for column in ("calibrating_hours", "fusing_hours", "memory_gb", "grams_gb"):
        assert table.loc["7B", column] <= table.loc["13B", column] < table.loc["70B", column]
    # 80 blocks of 8192 inputs to q/k/v, to o and to gate/up, and of 28672 to down.
    assert table.loc["70B", "grams_gb"] == pytest.approx(80 * 4 * (3 * 8192**2 + 28672**2) / 1e9)


def test_a_pair_of_llamas_is_one_of_real_deltas(tmp_path: Path) -> None:
    shape = pair.Shape(layers=1, hidden=16, inner=24, vocabulary=50)
    base, tuned = map(Checkpoint, pair.write_pair(tmp_path, shape))
    assert sum(tensor.numel() for tensor in base.values()) == shape.numel
    weight = "model.layers.0.mlp.up_proj.weight"
    assert base[weight].dtype == torch.bfloat16
    assert 0.1 < float((base[weight] != tuned[weight]).float().mean()) <= 1
