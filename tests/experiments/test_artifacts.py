from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from experiments.artifacts import MANIFEST, Store, peak_memory_gb, reset_peak_memory, write_atomically
from experiments.errors import ArtifactError
from experiments.sources import REPOSITORY, closure, source_hash

MODULES = ("experiments.artifacts",)


def write(out: Path) -> None:
    (out / "result.txt").write_text("whole")


def test_an_artifact_is_built_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.build("stage", {"a": 1}, MODULES, write)
    again = store.build("stage", {"a": 1}, MODULES, lambda out: pytest.fail("built twice"))
    assert (first.reused, again.reused) == (False, True)
    assert again.folder == first.folder
    assert (again.folder / "result.txt").read_text() == "whole"
    manifest = json.loads((first.folder / MANIFEST).read_text())
    assert manifest["inputs"] == {"a": 1}
    assert manifest["files"]["result.txt"].startswith("5 ")
    assert {"torch", "transformers"} <= manifest["versions"].keys()


@pytest.mark.parametrize(
    ("store_common", "stage", "inputs", "modules"),
    [
        ({"threads": 2}, "stage", {"a": 1}, MODULES),
        ({"threads": 1}, "other", {"a": 1}, MODULES),
        ({"threads": 1}, "stage", {"a": 2}, MODULES),
        ({"threads": 1}, "stage", {"a": 1}, ("experiments.errors",)),
    ],
    ids=["common", "stage", "inputs", "code"],
)
def test_every_input_is_part_of_the_key(tmp_path: Path, store_common: dict, stage: str, inputs: dict, modules) -> None:
    known = Store(tmp_path, {"threads": 1}).build("stage", {"a": 1}, MODULES, write)
    other = Store(tmp_path, store_common).build(stage, inputs, modules, write)
    assert other.folder != known.folder
    assert not other.reused


def test_code_is_followed_through_its_imports() -> None:
    found = closure(["tailor.methods.dare"])
    assert {"tailor.methods.dare", "tailor.method", "tailor.gram", "tailor.storage", "tailor.errors"} <= set(found)
    assert not any(name.startswith("experiments") for name in found)
    assert "tailor.methods.magnitude" not in found
    assert {"experiments.models.adapter", "experiments.worlds.captions"} <= set(
        closure(["experiments.stages.pretrain"])
    )
    assert source_hash(["tailor.masks"]) != source_hash(["tailor.gram"])
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        source_hash(["tailor.no_such"])


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        write(out)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        Store(tmp_path).build("stage", {}, MODULES, fail)
    assert [path.name for path in (tmp_path / "artifacts/stage").iterdir() if path.is_dir()] == []
    assert not Store(tmp_path).build("stage", {}, MODULES, write).reused


def test_a_killed_build_is_started_anew(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from experiments.artifacts import Store
        def hang(out):
            (out / "half.txt").write_text("ha")
            print("writing", flush=True)
            time.sleep(60)
        Store(Path({str(tmp_path)!r})).build("stage", {{}}, {MODULES!r}, hang)
    """)
    with subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    artifact = Store(tmp_path).build("stage", {}, MODULES, write)
    assert not artifact.reused
    assert sorted(os.listdir(artifact.folder)) == [MANIFEST, "result.txt"]


def test_parallel_jobs_build_once(tmp_path: Path) -> None:
    built: list[int] = []
    reused: list[bool] = []

    def slowly(out: Path) -> None:
        time.sleep(0.5)
        built.append(1)
        write(out)

    def job() -> None:
        reused.append(Store(tmp_path).build("stage", {}, MODULES, slowly).reused)

    jobs = [threading.Thread(target=job) for _ in range(3)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()
    assert built == [1]
    assert sorted(reused) == [False, True, True]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "result.txt").write_text("wh"),
        lambda folder: (folder / "result.txt").write_text("WHOLE"),
        lambda folder: (folder / MANIFEST).unlink(),
    ],
    ids=["shorter", "other bytes", "no manifest"],
)
def test_a_damaged_artifact_is_not_trusted(tmp_path: Path, damage) -> None:
    folder = Store(tmp_path).build("stage", {}, MODULES, write).folder
    damage(folder)
    with pytest.raises(ArtifactError, match=rf"{folder}.*delete"):
        Store(tmp_path).build("stage", {}, MODULES, write)


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(ArtifactError, match="TAILOR_HOME"):
        Store(tmp_path / "home").build("stage", {}, MODULES, write)


def test_a_full_disk(tmp_path: Path) -> None:
    def fill(out: Path) -> None:
        with Path("/dev/full").open("w") as full:
            full.write("x" * 10_000)

    with pytest.raises(ArtifactError, match=r"No space left.*free some space"):
        Store(tmp_path).build("stage", {}, MODULES, fill)
    assert not list((tmp_path / "artifacts/stage").glob("*/"))


def test_a_disk_that_fills_under_safetensors(tmp_path: Path) -> None:
    def fill(out: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(ArtifactError, match=r"No space left.*free some space"):
        Store(tmp_path).build("stage", {}, MODULES, fill)


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Store(tmp_path).build("stage", {}, MODULES, lambda out: (out / "no" / "such").read_text())


def test_peak_memory_is_counted_from_the_reset() -> None:
    reset_peak_memory()
    before = peak_memory_gb()
    block = bytearray(300_000_000)
    after = peak_memory_gb()
    del block
    reset_peak_memory()
    assert 0.25 < after - before < 0.35
    assert peak_memory_gb() < after - 0.2


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_atomically(path, "old")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
