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

from experiments.artifacts import MANIFEST, REPOSITORY, Store, source_hash, write_atomically
from experiments.errors import ArtifactError

SOURCES = ("experiments/artifacts.py",)


def write(out: Path) -> None:
    (out / "result.txt").write_text("whole")


def test_an_artifact_is_built_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.build("stage", {"a": 1}, SOURCES, write)
    again = store.build("stage", {"a": 1}, SOURCES, lambda out: pytest.fail("built twice"))
    assert (first.reused, again.reused) == (False, True)
    assert again.folder == first.folder
    assert (again.folder / "result.txt").read_text() == "whole"
    manifest = json.loads((first.folder / MANIFEST).read_text())
    assert manifest["inputs"] == {"a": 1}
    assert manifest["files"] == {"result.txt": 5}
    assert {"torch", "transformers"} <= manifest["versions"].keys()


@pytest.mark.parametrize(
    ("store_common", "stage", "inputs", "sources"),
    [
        ({"threads": 2}, "stage", {"a": 1}, SOURCES),
        ({"threads": 1}, "other", {"a": 1}, SOURCES),
        ({"threads": 1}, "stage", {"a": 2}, SOURCES),
        ({"threads": 1}, "stage", {"a": 1}, ("experiments/errors.py",)),
    ],
    ids=["common", "stage", "inputs", "sources"],
)
def test_every_input_is_part_of_the_key(tmp_path: Path, store_common: dict, stage: str, inputs: dict, sources) -> None:
    known = Store(tmp_path, {"threads": 1}).build("stage", {"a": 1}, SOURCES, write)
    other = Store(tmp_path, store_common).build(stage, inputs, sources, write)
    assert other.folder != known.folder
    assert not other.reused


def test_source_hash_follows_the_files() -> None:
    assert source_hash(("tailor",)) != source_hash(("tailor/gram.py",))
    with pytest.raises(FileNotFoundError, match="no_such"):
        source_hash(("tailor/no_such.py",))


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        write(out)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        Store(tmp_path).build("stage", {}, SOURCES, fail)
    assert [path.name for path in (tmp_path / "artifacts/stage").iterdir() if path.is_dir()] == []
    assert not Store(tmp_path).build("stage", {}, SOURCES, write).reused


def test_a_killed_build_is_started_anew(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from experiments.artifacts import Store
        def hang(out):
            (out / "half.txt").write_text("ha")
            print("writing", flush=True)
            time.sleep(60)
        Store(Path({str(tmp_path)!r})).build("stage", {{}}, {SOURCES!r}, hang)
    """)
    with subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    artifact = Store(tmp_path).build("stage", {}, SOURCES, write)
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
        reused.append(Store(tmp_path).build("stage", {}, SOURCES, slowly).reused)

    jobs = [threading.Thread(target=job) for _ in range(3)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()
    assert built == [1]
    assert sorted(reused) == [False, True, True]


@pytest.mark.parametrize("damage", [lambda p: (p / "result.txt").write_text("wh"), lambda p: (p / MANIFEST).unlink()])
def test_a_damaged_artifact_is_not_trusted(tmp_path: Path, damage) -> None:
    folder = Store(tmp_path).build("stage", {}, SOURCES, write).folder
    damage(folder)
    with pytest.raises(ArtifactError, match=rf"{folder}.*delete"):
        Store(tmp_path).build("stage", {}, SOURCES, write)


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(ArtifactError, match="TAILOR_HOME"):
        Store(tmp_path / "home").build("stage", {}, SOURCES, write)


def test_a_full_disk(tmp_path: Path) -> None:
    def fill(out: Path) -> None:
        with Path("/dev/full").open("w") as full:
            full.write("x" * 10_000)

    with pytest.raises(ArtifactError, match=r"No space left.*free some space"):
        Store(tmp_path).build("stage", {}, SOURCES, fill)
    assert not list((tmp_path / "artifacts/stage").glob("*/"))


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_atomically(path, "old")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
