"""Accumulating, damping and keeping Grams."""

from __future__ import annotations

import pytest
import torch

from tailor.errors import CheckpointError, EmptyCalibration, InvalidSetting, NotFinite, TailorError
from tailor.gram import GramAccumulator, Grams, damp


def test_by_hand():
    accumulator = GramAccumulator()
    accumulator.add(torch.tensor([[1.0, 2.0]]))
    accumulator.add(torch.tensor([[[3.0, 0.0]]]))
    # (2 / 2) * ([[1, 2], [2, 4]] + [[9, 0], [0, 0]]), and 1 % of the mean diagonal 7
    assert torch.allclose(accumulator.finish(0.01), torch.tensor([[10.07, 2.0], [2.0, 4.07]]))
    assert accumulator.token_count == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_against_float64_over_batches_with_padding(dtype):
    torch.manual_seed(0)
    batches = [(torch.randn(3, 5, 4).to(dtype), torch.rand(3, 5) < 0.6) for _ in range(4)]
    accumulator = GramAccumulator()
    rows = []
    for inputs, token_mask in batches:
        rows.append(inputs[token_mask].double())
        padded = inputs.masked_fill(~token_mask[..., None], torch.nan)  # padding may hold anything
        accumulator.add(padded, token_mask)
    tokens = torch.cat(rows)
    gram = accumulator.finish(damping=0.0)
    assert gram.dtype == torch.float32 and torch.equal(gram, gram.T)
    assert accumulator.token_count == len(tokens)
    torch.testing.assert_close(gram.double(), 2 / len(tokens) * tokens.T @ tokens, rtol=1e-5, atol=1e-6)


def test_no_token():
    with pytest.raises(EmptyCalibration, match="no calibration token"):
        GramAccumulator().finish(0.01)
    accumulator = GramAccumulator("layer.weight")
    accumulator.add(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(EmptyCalibration, match=r"layer\.weight: no calibration token reached"):
        accumulator.finish(0.01)


def test_undefined_inputs_are_counted():
    accumulator = GramAccumulator("layer.weight")
    accumulator.add(torch.tensor([[1.0, torch.nan, 2.0]]))
    with pytest.raises(NotFinite, match=r"layer\.weight: 5 of 9 entries"):
        accumulator.finish(0.01)


def test_shapes_that_do_not_fit():
    accumulator = GramAccumulator("layer.weight")
    with pytest.raises(TailorError, match="does not fit inputs"):
        accumulator.add(torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))
    accumulator.add(torch.ones(2, 4))
    with pytest.raises(TailorError, match="width 5 after width 4"):
        accumulator.add(torch.ones(2, 5))


def test_damping_leaves_its_input_alone():
    gram = torch.diag(torch.tensor([1.0, 3.0]))
    assert torch.equal(damp(gram, 0.5), torch.diag(torch.tensor([2.0, 4.0])))
    assert torch.equal(gram, torch.diag(torch.tensor([1.0, 3.0])))
    with pytest.raises(InvalidSetting, match="damping"):
        damp(gram, -0.1)


@pytest.fixture
def grams():
    torch.manual_seed(1)
    sums = {"qkv": GramAccumulator(), "out": GramAccumulator()}
    sums["qkv"].add(torch.randn(7, 4))
    sums["out"].add(torch.randn(9, 3))
    return Grams.collect({"q": "qkv", "k": "qkv", "o": "out"}, sums)


def test_layers_share_a_matrix(grams):
    assert set(grams) == {"q", "k", "o"} and len(grams) == 3 and "v" not in grams
    assert grams["q"] is grams["k"] and grams["o"].shape == (3, 3)
    assert grams.token_count("k") == 7 and grams.token_count("o") == 9


def test_save_and_load(tmp_path, grams):
    grams.save(tmp_path / "grams.safetensors")
    loaded = Grams.load(tmp_path / "grams.safetensors")
    assert dict(loaded.keys_of_layers) == dict(grams.keys_of_layers)
    assert all(torch.equal(loaded[layer], grams[layer]) for layer in grams)
    assert loaded.token_count("o") == 9
    first = (tmp_path / "grams.safetensors").read_bytes()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "grams.safetensors"]


def test_files_that_are_no_grams(tmp_path, grams):
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Grams.load(tmp_path / "missing")
    path = tmp_path / "grams.safetensors"
    grams.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Grams.load(path)
    with pytest.raises(CheckpointError, match="'out' is missing"):
        Grams({"o": "out"}, {}, {})
