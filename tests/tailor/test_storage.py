"""Files of tensors: their bytes, and what is left of them when something goes wrong."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tailor.checkpoint import Checkpoint, CheckpointWriter
from tailor.errors import CheckpointError, CheckpointMismatch, InvalidSetting
from tailor.fuse import fuse
from tailor.methods.wise_ft import WiseFT
from tailor.partial import partial_sibling
from tailor.sizes import parse_bytes
from tailor.storage import _DTYPES, TensorFile, TensorFileWriter, TensorForm, save_tensors
from tests.checkpoints import write_folder

ROOT = Path(__file__).resolve().parents[2]


def every_dtype() -> dict[str, Tensor]:
    """Tensors whose order in a file, by dtype and then by name, is none that they could have by chance."""
    tensors = {
        f'{letter}{number} é"\\': torch.arange(2 + number).to(dtype)
        for number, dtype in enumerate(_DTYPES.values())
        for letter in "ba"
    }
    return {**tensors, "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "odd": torch.ones(3).bool()}


def forms_of(tensors: dict[str, Tensor]) -> dict[str, TensorForm]:
    return {name: TensorForm(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "library", {"format": "pt"})
    writer = TensorFileWriter(tmp_path / "ours", forms_of(tensors), {"format": "pt"})
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    assert not writer.missing
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    file = TensorFile(tmp_path / "ours")
    assert {name: file.form(name) for name in file} == forms_of(tensors)


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    save_tensors(tmp_path / "patch", {"w": torch.ones(2)}, {})
    (tmp_path / "other").touch()
    assert (tmp_path / "patch").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_reading_every_tensor_maps_no_more_than_one(tmp_path: Path) -> None:
    save_file({str(number): torch.ones(1 << 18) for number in range(64)}, tmp_path / "large")  # 64 MiB
    code = f"""
import re, torch
from tailor.storage import TensorFile
torch.set_num_threads(1)
def mapped():
    return int(re.search(r"RssFile:\\s+(\\d+)", open("/proc/self/status").read())[1])
file = TensorFile({str(tmp_path / "large")!r})
float(file["0"].sum())
before = mapped()
for name in file:
    float(file[name].sum())
print(mapped() - before)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 8 << 10, "pages of tensors that are gone are still there (KiB)"


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (7, 7),
        ("7", 7),
        ("7B", 7),
        ("2KB", 2000),
        ("2 KiB", 2048),
        ("5GB", 5 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("3mb", 3 * 10**6),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("0.5 MiB", 2**19),
    ],
)
def test_sizes(size: int | str, count: int) -> None:
    assert parse_bytes(size, "limit") == count


@pytest.mark.parametrize("size", ["", "GB", "5 XB", "-1", -1, 0, "0.1B", "1e9", True, "5GBs", "1,5GB"])
def test_what_is_no_size(size: int | str) -> None:
    with pytest.raises(InvalidSetting, match="limit = "):
        parse_bytes(size, "limit")


def pair(folder: Path, shards: int = 2) -> tuple[Path, Path, dict[str, Tensor]]:
    torch.manual_seed(0)
    base = {name: torch.randn(8, 4) for name in ("a", "b", "c", "d")}
    tuned = {name: tensor + 0.1 for name, tensor in base.items()}
    return write_folder(folder / "base", base, shards), write_folder(folder / "tuned", tuned, shards), tuned


def truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])


def corrupt(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:8] + b"not a header" + shard.read_bytes()[20:])


def overstate(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes((2**40).to_bytes(8, "little") + shard.read_bytes()[8:])


def promise(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def mistake(shard_of: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))


BROKEN = {
    "truncated shard": (truncate, CheckpointError, r"00002-of-00002.*not a whole safetensors file"),
    "corrupt header": (corrupt, CheckpointError, r"00001-of-00002.*not a whole safetensors file"),
    "header longer than the file": (overstate, CheckpointError, "not a whole safetensors file"),
    "missing shard": (
        lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(),
        CheckpointError,
        "names missing files: model-00001-of-00002",
    ),
    "tensor that no shard has": (promise, (CheckpointError, CheckpointMismatch), "ghost"),
    "index that is a list": (mistake(["a", "b"]), CheckpointError, "not a readable index"),
    "index of numbers": (mistake({"a": 1}), CheckpointError, "not a readable index"),
}


@pytest.mark.parametrize("whose", ["base", "tuned"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_named_and_leaves_nothing(tmp_path: Path, case: str, whose: str) -> None:
    base, tuned, _ = pair(tmp_path)
    damage, error, message = BROKEN[case]
    damage(tmp_path / whose)
    with pytest.raises(error, match=message):
        fuse(base, tuned, WiseFT(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_tensors_in_one_checkpoint_only(tmp_path: Path) -> None:
    base, tuned, tensors = pair(tmp_path, shards=1)
    save_file({"a": tensors["a"], "new": torch.ones(2)}, tuned / "model.safetensors")
    with pytest.raises(CheckpointMismatch) as caught:
        fuse(base, tuned, WiseFT(), tmp_path / "out")
    for line in ("pretrained: b", "pretrained: c", "pretrained: d", "fine-tuned: new"):
        assert f"only in the {line}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, _ = pair(tmp_path)
    write, written = TensorFileWriter.write, []

    def fill_up(self: TensorFileWriter, name: str, tensor: Tensor) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(name)
        write(self, name, tensor)

    monkeypatch.setattr(TensorFileWriter, "write", fill_up)
    with pytest.raises(CheckpointError, match=r"out: cannot be written.*No space left.*check free space"):
        fuse(base, tuned, WiseFT(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="patch: cannot be written"):
        save_tensors(tmp_path / "patch", {"w": torch.ones(2)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_too_little_room_is_seen_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, _ = pair(tmp_path)
    usage = type("Usage", (), {"free": 511})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"out: needs 5.12e-07 GB, and the disk has 5.11e-07 GB left"):
        fuse(base, tuned, WiseFT(), tmp_path / "out", progress=pytest.fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_the_limit_of_a_shard_reaches_the_folder(tmp_path: Path) -> None:
    base, tuned, tensors = pair(tmp_path)
    fuse(base, tuned, WiseFT(1), tmp_path / "out", max_shard_bytes="256B")
    assert len(list((tmp_path / "out").glob("model-*-of-00002.safetensors"))) == 2
    assert all(torch.equal(Checkpoint(tmp_path / "out")[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(InvalidSetting, match="max_shard_bytes = 'much'"):
        fuse(base, tuned, WiseFT(1), tmp_path / "other", max_shard_bytes="much")


def test_what_was_not_announced_or_is_left_out(tmp_path: Path) -> None:
    base, _, tensors = pair(tmp_path)
    for name, tensor in (("z", tensors["a"]), ("a", tensors["a"].half()), ("a", tensors["a"].T)):
        with pytest.raises(CheckpointError, match="announced was"), CheckpointWriter(tmp_path / "out", base) as writer:
            writer.write(name, tensor)
    with (
        pytest.raises(CheckpointError, match="3 tensors were not written: b, c, d"),
        CheckpointWriter(tmp_path / "out", base) as writer,
    ):
        writer.write("a", tensors["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


KILLED = """
import os, signal, sys, torch
from tailor.checkpoint import Checkpoint, CheckpointWriter
with CheckpointWriter(sys.argv[1], sys.argv[2]) as writer:
    writer.write("a", Checkpoint(sys.argv[2])["a"])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_output_and_the_next_one_clears_up(tmp_path: Path) -> None:
    base, _, _ = pair(tmp_path)
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), str(base)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".out.*.partial")
    assert not out.exists() and (left / "model.safetensors").is_file()
    others = [tmp_path / name for name in (".out.partial", ".other.abc.partial", ".out2.abc.partial")]
    for other in others:
        other.mkdir()
    with CheckpointWriter(out, base) as writer:
        assert not left.exists()
        for name, tensor in Checkpoint(base).items():
            writer.write(name, tensor)
    assert out.is_dir() and all(other.is_dir() for other in others)
    assert not list(tmp_path.glob(".out.*.partial"))


def test_what_a_live_writer_has_begun_is_left_alone(tmp_path: Path) -> None:
    with partial_sibling(tmp_path / "out", folder=True) as first:
        with partial_sibling(tmp_path / "out", folder=False) as second:
            assert first.is_dir() and second.is_file() and first != second
        assert first.is_dir() and not second.exists()
    assert not list(tmp_path.iterdir())


def test_a_partial_file_taken_for_abandoned_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, stolen = fcntl.flock, []

    def steal_once(descriptor: int, operation: int) -> None:
        if not stolen:
            (path,) = tmp_path.glob(".out.*.partial")
            path.rmdir()
            stolen.append(path)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", steal_once)
    with partial_sibling(tmp_path / "out", folder=True) as path:
        assert path.is_dir() and path not in stolen


def test_names_with_wildcards_clear_only_their_own(tmp_path: Path) -> None:
    for name in (".o*t.abc.partial", ".out.abc.partial"):
        (tmp_path / name).mkdir()
    with partial_sibling(tmp_path / "o*t", folder=True):
        assert not (tmp_path / ".o*t.abc.partial").exists() and (tmp_path / ".out.abc.partial").exists()


def test_saving_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "patch"
    save_tensors(path, {"w": torch.ones(2)}, {"version": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(CheckpointError, match="patch: cannot be written"):
        save_tensors(path, {"w": torch.zeros(2)}, {"version": 2})
    assert torch.equal(load_file(path)["w"], torch.ones(2)) and TensorFile(path).header() == {"version": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["patch"]


def test_a_damaged_header_is_no_traceback(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "patch", {"tailor": "{"})
    with pytest.raises(CheckpointError, match="its header is damaged"):
        TensorFile(tmp_path / "patch").header()
