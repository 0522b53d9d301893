"""Reading and writing checkpoint folders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open

import tailor.storage
from tailor.checkpoint import Checkpoint, CheckpointWriter
from tailor.errors import CheckpointError


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "b": torch.randn(4, 3).bfloat16(),
        "a": torch.randn(5),
        "scalar": torch.tensor(2.5),
        "c": torch.randn(2, 2).half(),
        "ids": torch.arange(3),
        "empty": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("shards", [1, 3])
def test_view_of_a_folder(tmp_path, write_checkpoint, tensors, shards):
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "model", tensors, shards))
    assert checkpoint.names == tuple(checkpoint) == ("a", "b", "c", "empty", "ids", "scalar")
    assert len(checkpoint) == 6 and "a" in checkpoint and "z" not in checkpoint
    assert checkpoint.numel == 12 + 5 + 1 + 4 + 3
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype == checkpoint[name].dtype
        assert torch.equal(checkpoint[name], tensor)
    with pytest.raises(KeyError):
        checkpoint["z"]


def test_single_file_wins_over_an_index(tmp_path, write_checkpoint, tensors):
    folder = write_checkpoint(tmp_path / "model", tensors)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert len(Checkpoint(folder)) == len(tensors)


def test_other_files_leave_out_weights_of_any_kind(tmp_path, write_checkpoint, tensors):
    folder = write_checkpoint(tmp_path / "model", tensors, shards=2)
    for name in ("pytorch_model.bin", "optimizer.pt", ".hidden"):
        (folder / name).write_bytes(b"x")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "config.json").write_text("{}")
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    assert [path.as_posix() for path in Checkpoint(folder).other_files()] == ["config.json", "processor/vocabulary.txt"]


def test_missing_folder_weights_or_shards(tmp_path, write_checkpoint, tensors):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path / "empty")
    folder = write_checkpoint(tmp_path / "model", tensors, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing files: model-00002-of-00003"):
        Checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a readable index"):
        Checkpoint(folder)


def test_truncated_shard_is_named_when_it_is_read(tmp_path, write_checkpoint, tensors):
    folder = write_checkpoint(tmp_path / "model", tensors, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    checkpoint = Checkpoint(folder)
    readable = list(tensors)[0::2]
    assert torch.equal(checkpoint[readable[0]], tensors[readable[0]])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*not a whole safetensors file"):
        checkpoint[list(tensors)[1]]


def test_index_that_promises_too_much(tmp_path, write_checkpoint, tensors):
    folder = write_checkpoint(tmp_path / "model", tensors, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks ghost"):
        Checkpoint(folder)["ghost"]


@pytest.mark.parametrize("max_shard_bytes", [1, 50, 10**9])
def test_written_folder_reads_back(tmp_path, write_checkpoint, tensors, max_shard_bytes):
    like = write_checkpoint(tmp_path / "like", tensors)
    out = tmp_path / "out"
    with CheckpointWriter(out, like, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    checkpoint = Checkpoint(out)
    assert checkpoint.names == tuple(sorted(tensors))
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in tensors.items())
    assert (out / "processor" / "vocabulary.txt").read_bytes() == b"a\r\nb\x00\xff"
    assert json.loads((out / "config.json").read_text()) == {"made_for": "like"}
    for shard in out.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    index = out / "model.safetensors.index.json"
    if max_shard_bytes == 10**9:
        assert not index.exists() and (out / "model.safetensors").exists()
    else:
        stored = json.loads(index.read_text())
        assert set(stored["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
        assert stored["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["like", "out"]


def test_memory_mapped_tensors_can_be_written(tmp_path, write_checkpoint, tensors):
    like = Checkpoint(write_checkpoint(tmp_path / "like", tensors))
    with CheckpointWriter(tmp_path / "out", like.folder) as writer:
        for name in like:
            writer.write(name, like[name])
    assert all(torch.equal(Checkpoint(tmp_path / "out")[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_remains_after_an_exception(tmp_path, write_checkpoint, tensors, error):
    like = write_checkpoint(tmp_path / "like", tensors)
    with pytest.raises(error), CheckpointWriter(tmp_path / "out", like, max_shard_bytes=1) as writer:
        writer.write("a", tensors["a"])
        writer.write("b", tensors["b"])
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["like"]


@pytest.mark.parametrize("failing", ["open", "copyfile", "rename"])
def test_disk_full_is_explained_and_leaves_nothing(tmp_path, write_checkpoint, tensors, monkeypatch, failing):
    like = write_checkpoint(tmp_path / "like", tensors)

    def fail(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    if failing == "open":
        monkeypatch.setattr(tailor.storage, "open", fail, raising=False)
    elif failing == "copyfile":
        monkeypatch.setattr(shutil, "copyfile", fail)
    else:
        monkeypatch.setattr("pathlib.Path.rename", fail)
    with (
        pytest.raises(CheckpointError, match=r"out: cannot be written.*No space left.*check free space"),
        CheckpointWriter(tmp_path / "out", like) as writer,
    ):
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["like"]


def test_output_that_exists_or_cannot_be_made(tmp_path, write_checkpoint, tensors):
    like = write_checkpoint(tmp_path / "like", tensors)
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="already exists"), CheckpointWriter(tmp_path / "taken", like):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"), CheckpointWriter(tmp_path / "file" / "out", like):
        pass


def test_a_tensor_is_written_once(tmp_path, write_checkpoint, tensors):
    like = write_checkpoint(tmp_path / "like", tensors)
    with (
        pytest.raises(CheckpointError, match="a was written twice"),
        CheckpointWriter(tmp_path / "out", like) as writer,
    ):
        writer.write("a", tensors["a"])
        writer.write("a", tensors["a"])
