"""Dry runs: what they say of every tensor, and what the cost model counts."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from safetensors.torch import save_file

from experiments.cost import Layer, Rates, cost, layer_operations, support_operations
from tailor.checkpoint import Checkpoint
from tests.experiments.pairs import Pair, make_pair
from tests.experiments.test_command_line import command


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("llava"), "llava")


def dry_run(pair: Pair, home: Path, *overrides: str) -> tuple[str, dict[str, str]]:
    """What is printed, and each tensor's fate in the file that is written."""
    done = command("experiments.fuse", *pair.arguments, "dry_run=true", *overrides, home=home)
    assert done.returncode == 0, done.stderr
    (table,) = home.glob("fuses/*/tensors.csv")
    with table.open() as file:
        return done.stdout, {row["tensor"]: row["fate"] for row in csv.DictReader(file)}


def test_a_dry_run_tells_every_fate_and_writes_nothing(llava: Pair, tmp_path: Path) -> None:
    told, fates = dry_run(llava, tmp_path / "home", f"out={tmp_path / 'out'}", f"calibration.data={llava.samples}")
    base, tuned = Checkpoint(llava.pretrained), Checkpoint(llava.finetuned)
    assert fates == {name: "copied" if bool((base[name] == tuned[name]).all()) else "fused" for name in base}
    assert "language_model.model.layers.[0-2].mlp.down_proj.weight" in told
    for line in ("Tensors (parameters):", "Disk: 2.9 MB for a checkpoint", "Memory:", "Time: about"):
        assert line in told
    assert not (tmp_path / "out").exists()


def test_a_dry_run_keeps_to_the_scope(llava: Pair, tmp_path: Path) -> None:
    tensors = dict(Checkpoint(llava.finetuned))
    same = "multi_modal_projector.linear_1.weight"
    tensors[same] = Checkpoint(llava.pretrained)[same]
    other = Pair("llava", llava.pretrained, tmp_path / "finetuned", llava.samples)
    other.finetuned.mkdir()
    save_file(tensors, other.finetuned / "model.safetensors", {"format": "pt"})
    told, fates = dry_run(other, tmp_path / "home", "baseline=dare", "scope=[multi_modal_projector.*]")
    assert fates.pop(same) == "kept"
    assert {name for name, fate in fates.items() if fate == "fused"} == {
        "multi_modal_projector.linear_1.bias",
        "multi_modal_projector.linear_2.bias",
        "multi_modal_projector.linear_2.weight",
    }
    assert "Memory: a few times the largest tensor" in told


def test_operations_are_counted_from_shapes() -> None:
    layer = Layer(rows=10, width=6)
    assert support_operations(layer, 0.5) == 10 * (3**3 / 3 + 2 * 3**2)
    assert layer_operations(layer, "exact") == 4 / 3 * 6**3 + 5 * 2 * 10 * 6**2


def test_costs_add_up_over_layers_and_tokens() -> None:
    def of(count: int, tokens: int) -> tuple[float, float]:
        settings = {"sparsity": 0.1, "decorator": "exact", "parameters_run": 100 * count, "gram_memory": 10**9}
        found = cost([Layer(50, 40)] * count, [40] * count, 0, Rates(1.0, 1.0, math.inf), tokens=tokens, **settings)
        return found.calibrating, found.fusing

    (calibrating, fusing), (twice_calibrating, twice_fusing) = of(1, 7), of(2, 7)
    assert (twice_calibrating, twice_fusing) == (2 * calibrating, 2 * fusing)
    assert of(1, 14) == (2 * calibrating, fusing)
    assert calibrating == 2 * 100 * 7 + 2 * 7 * 40**2
