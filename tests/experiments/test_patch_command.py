"""``python -m experiments.patch`` on tiny checkpoint folders, bit for bit and with what can go wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments import patch as command
from tailor.patch import Patch
from tests.checkpoints import COMPANION, COMPANION_BYTES, write_folder
from tests.experiments.conftest import ROOT

Weights = dict[str, Tensor]


def read_folder(folder: Path) -> Weights:
    tensors: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def bits(tensors: Weights) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def pair(dtype: torch.dtype) -> tuple[Weights, Weights]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = {"layer[0].weight": random(30, 40), "layer[0].bias": random(30), "head": random(5, 40), "scale": random(1)}
    base = {name: tensor.to(dtype) for name, tensor in base.items()}
    fused = {name: tensor.clone() for name, tensor in base.items()}
    chosen = torch.rand(30, 40, generator=generator) < 0.1
    fused["layer[0].weight"][chosen] += 0.5
    fused["layer[0].bias"][3] = -0.0
    base["layer[0].bias"][3] = 0.0  # a change that only bits show
    base["position_ids"] = fused["position_ids"] = torch.arange(7)
    return base, fused


Folders = tuple[Path, Path, Path]


@pytest.fixture
def make_folders(tmp_path: Path) -> Callable[..., Folders]:
    """(base, fused, patch file) of a pair, the patch extracted by the command."""

    def make(dtype: torch.dtype = torch.float32, shards: tuple[int, int] = (1, 1)) -> Folders:
        base, fused = pair(dtype)
        folders = write_folder(tmp_path / "base", base, shards[0]), write_folder(tmp_path / "fused", fused, shards[1])
        command.extract(*folders, tmp_path / "patch")
        return *folders, tmp_path / "patch"

    return make


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["patch", *map(str, arguments)])
    command.main()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [(1, 1), (2, 3)])
def test_round_trip(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: torch.dtype,
    shards: tuple[int, int],
) -> None:
    base, fused = pair(dtype)
    base_folder = write_folder(tmp_path / "base", base, shards[0])
    fused_folder = write_folder(tmp_path / "fused", fused, shards[1])
    patch = tmp_path / "patch.safetensors"
    call(monkeypatch, "extract", base_folder, fused_folder, patch)
    call(monkeypatch, "apply", base_folder, patch, tmp_path / "applied")
    call(monkeypatch, "remove", fused_folder, patch, tmp_path / "removed")
    call(monkeypatch, "remove", tmp_path / "applied", patch, tmp_path / "there_and_back")

    assert bits(read_folder(tmp_path / "applied")) == bits(fused)
    assert bits(read_folder(tmp_path / "removed")) == bits(read_folder(tmp_path / "there_and_back")) == bits(base)
    assert Patch.load(patch).header == {"base": "base", "fused": "fused"}
    changed = int((base["layer[0].weight"] != fused["layer[0].weight"]).sum()) + 1
    printed = capsys.readouterr()
    assert printed.out.count(f" {changed} changed entries in 2 tensors") == 4
    assert printed.err == ""
    for folder, of in (("applied", "base"), ("removed", "fused"), ("there_and_back", "base")):
        assert json.loads((tmp_path / folder / "config.json").read_text()) == {"made_for": of}
        assert (tmp_path / folder / COMPANION).read_bytes() == COMPANION_BYTES
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_several_patches_stack_and_come_off_in_reverse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, fused = pair(torch.bfloat16)
    last = {**fused, "head": fused["head"] + 1, "layer[0].weight": -fused["layer[0].weight"]}
    folders = [write_folder(tmp_path / str(number), stage) for number, stage in enumerate((base, fused, last))]
    patches = [tmp_path / "one", tmp_path / "two"]
    for before, after, patch in zip(folders, folders[1:], patches, strict=False):
        command.extract(before, after, patch)
    call(monkeypatch, "apply", folders[0], *patches, tmp_path / "applied")
    call(monkeypatch, "remove", tmp_path / "applied", *patches, tmp_path / "removed")
    assert bits(read_folder(tmp_path / "applied")) == bits(last)
    assert bits(read_folder(tmp_path / "removed")) == bits(base)
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match=r"error: .*differ from the patch's base"):
        call(monkeypatch, "apply", folders[0], *reversed(patches), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_info(
    make_folders: Callable[..., Folders], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, path = make_folders(torch.bfloat16)
    patch = Patch.load(path)
    Patch(patch.tensors, {"base": "toy [7B]", "settings": {"sparsity": 0.1}, "seed": 3}).save(path)
    call(monkeypatch, "info", path)
    lines = capsys.readouterr().out.splitlines()
    assert {"base: toy [7B]", 'settings: {"sparsity": 0.1}', "seed: 3"} <= set(lines)
    (weight,) = [line for line in lines if "layer[0].weight" in line]
    (bias,) = [line for line in lines if "layer[0].bias" in line]
    changed = patch.tensors["layer[0].weight"].xors.numel()
    cells = [cell.strip() for cell in weight.strip("│ ").split("│")]
    assert cells[:6] == ["layer[0].weight", "bfloat16", "30×40", "1,200", str(changed), f"{changed / 1200:.2%}"]
    assert cells[6] == f"{3 * changed} B"  # one byte for the gap, two for the bits
    assert [cell.strip() for cell in bias.strip("│ ").split("│")][3:] == ["30", "1", "3.33%", "3 B", "0.050"]
    assert f"{changed + 1} changed entries in 2 tensors" in lines[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stitching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    """Two patches meet at one entry, which becomes their mean; the others keep what their own patch made of them."""
    base = {"w": torch.zeros(2, 3, dtype=dtype), "b": torch.ones(2, dtype=dtype)}
    folder = write_folder(tmp_path / "base", base)
    tasks = {
        "one": {"w": torch.tensor([[2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]), "b": torch.tensor([1.0, 1.0])},
        "two": {"w": torch.tensor([[6.0, 0.0, 0.0], [0.0, 0.0, -3.0]]), "b": torch.tensor([1.0, 7.0])},
    }
    for name, weights in tasks.items():
        fused = write_folder(tmp_path / name, {key: tensor.to(dtype) for key, tensor in weights.items()})
        call(monkeypatch, "extract", folder, fused, tmp_path / f"{name}.patch")
    patches = [tmp_path / "one.patch", tmp_path / "two.patch"]
    call(monkeypatch, "stitch", folder, *patches, tmp_path / "stitched.patch")
    assert capsys.readouterr().out.endswith("stitched.patch: stitched 2 patches to 4 changed entries in 2 tensors\n")
    call(monkeypatch, "apply", folder, tmp_path / "stitched.patch", tmp_path / "out")
    expected = {"w": torch.tensor([[4.0, 4.0, 0.0], [0.0, 0.0, -3.0]]), "b": torch.tensor([1.0, 7.0])}
    found = read_folder(tmp_path / "out")
    assert {key: tensor.float().tolist() for key, tensor in found.items()} == {
        key: tensor.tolist() for key, tensor in expected.items()
    }
    call(monkeypatch, "stitch", folder, *reversed(patches), tmp_path / "reversed.patch")
    assert (tmp_path / "reversed.patch").read_bytes() == (tmp_path / "stitched.patch").read_bytes()

    with pytest.raises(SystemExit, match=r"error: .*stitched\.patch: already exists"):
        call(monkeypatch, "stitch", folder, *patches, tmp_path / "stitched.patch")
    with pytest.raises(SystemExit, match=r"error: w: the patch is applied here already"):
        call(monkeypatch, "stitch", tmp_path / "one", *patches, tmp_path / "other.patch")


def test_a_patch_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = pair(torch.float32)
    folder, patch = write_folder(tmp_path / "base", base), tmp_path / "patch"
    call(monkeypatch, "extract", folder, folder, patch)
    call(monkeypatch, "info", patch)
    call(monkeypatch, "apply", folder, patch, tmp_path / "out")
    assert "0 changed entries in 0 tensors" in capsys.readouterr().out
    assert bits(read_folder(tmp_path / "out")) == bits(base)


def test_a_base_that_differs_elsewhere_gets_a_warning(
    tmp_path: Path,
    make_folders: Callable[..., Folders],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, _, patch = make_folders()
    base, fused = pair(torch.float32)
    for weights in (base, fused):
        weights["layer[0].bias"][20] = 7
        weights["head"] += 1  # not patched, so nobody's business
    other = write_folder(tmp_path / "other", base)
    call(monkeypatch, "apply", other, patch, tmp_path / "out")
    warning = "warning: of 2 patched tensors, 1 match the patch's base at the patched places only"
    assert warning in (err := capsys.readouterr().err) and err.endswith("elsewhere: layer[0].bias\n")
    assert bits(read_folder(tmp_path / "out")) == bits(fused)
    call(monkeypatch, "remove", tmp_path / "out", patch, tmp_path / "back")
    assert warning in capsys.readouterr().err
    assert bits(read_folder(tmp_path / "back")) == bits(base)


def damage(path: Path, tensor: str, change: Callable[[Tensor], Tensor]) -> None:
    """Rewrite a patch with one of its stored tensors changed and everything else as it was."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    stored = load_file(path)
    stored[tensor] = change(stored[tensor])
    save_file(stored, path, metadata)


def wrong_base(folders: Folders) -> None:
    tensors = read_folder(folders[0])
    tensors["layer[0].weight"] += 1
    save_file(tensors, folders[0] / "model.safetensors")


WEIGHT = "layer[0].weight"
FAILURES: dict[str, tuple[str, Callable[[Folders], object], str]] = {
    "wrong base": ("apply", wrong_base, r"layer\[0\].weight: the weights differ from the patch's base \(base\)"),
    "applied already": ("apply fused", lambda f: None, "the patch is applied here already"),
    "not applied": ("remove base", lambda f: None, "the patch is not applied here"),
    "truncated patch": ("apply", lambda f: f[2].write_bytes(f[2].read_bytes()[:-5]), "not a whole safetensors file"),
    "truncated info": ("info", lambda f: f[2].write_bytes(f[2].read_bytes()[:40]), "not a whole safetensors file"),
    "no patch at all": (
        "apply",
        lambda f: f[2].write_bytes((f[0] / "model.safetensors").read_bytes()),
        "no header of this library",
    ),
    "missing patch": ("info", lambda f: f[2].unlink(), "not a whole safetensors file"),
    "folder for a patch": ("info base", lambda f: None, "not a whole safetensors file"),
    "bits damaged": (
        "apply",
        lambda f: damage(f[2], f"xors/{WEIGHT}", lambda t: t ^ 1),
        "it is damaged, copy it again",
    ),
    "places damaged": (
        "apply",
        lambda f: damage(f[2], f"gaps/{WEIGHT}", lambda t: torch.full_like(t, 200)),
        "do not fit its shape",
    ),
    "places missing": ("info", lambda f: damage(f[2], f"gaps/{WEIGHT}", lambda t: t[1:]), "do not fit its shape"),
    "missing folder": ("apply nowhere", lambda f: None, "nowhere: no such folder"),
    "folder exists": ("apply", lambda f: (f[0].parent / "out").mkdir(), "out: already exists"),
    "file exists": ("extract", lambda f: (f[0].parent / "out").write_text("mine"), "out: already exists"),
    "truncated weights": (
        "extract",
        lambda f: (f[1] / "model.safetensors").write_bytes((f[1] / "model.safetensors").read_bytes()[:-9]),
        "not a whole safetensors file",
    ),
    "other tensors": (
        "extract",
        lambda f: save_file({"head": torch.ones(5, 40)}, f[1] / "model.safetensors"),
        "the checkpoints do not hold the same tensors",
    ),
    "other dtype": (
        "extract",
        lambda f: save_file(
            {name: tensor.half() for name, tensor in read_folder(f[1]).items()}, f[1] / "model.safetensors"
        ),
        "a patch needs the same shape and dtype",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_goes_wrong_is_one_message(
    tmp_path: Path,
    make_folders: Callable[..., Folders],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    asked, prepare, message = FAILURES[case]
    folders = make_folders()
    prepare(folders)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    verb, _, given = asked.partition(" ")
    first = tmp_path / (given or "base")
    arguments = {
        "apply": (first, folders[2], tmp_path / "out"),
        "remove": (first, folders[2], tmp_path / "out"),
        "extract": (folders[0], folders[1], tmp_path / "out"),
        "info": (first if given else folders[2],),
    }
    with pytest.raises(SystemExit, match=f"^error: (.|\n)*{message}"):
        call(monkeypatch, verb, *arguments[verb])
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "a failed command left something behind"


def test_from_the_shell(tmp_path: Path) -> None:
    """A foreseen error is a message and exit code 1, a mistyped command 2; --help comes without torch."""

    def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "experiments.patch", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    failed = shell("apply", str(tmp_path / "nowhere"), "patch", "out")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.startswith("error: ") and "no such folder" in failed.stderr
    assert shell("applly").returncode == 2
    assert "extract" in shell("--help").stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "safetensors", "rich", "pandas", "hydra")
    code = f"import sys, experiments.patch; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (14_200_000_000, "14.2 GB")])
def test_sizes(count: int, text: str) -> None:
    assert command.size(count) == text
