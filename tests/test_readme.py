"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file

from tailor.fuse import fuse
from tailor.method import EvidenceKind, Fused

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def code_block(containing: str) -> str:
    (block,) = (found for found in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if containing in found)
    return block


def make_pair(folder: Path) -> None:
    torch.manual_seed(0)
    base = {"layer.weight": torch.randn(4, 6), "layer.bias": torch.randn(4)}
    for name, shift in (("pretrained", 0.0), ("finetuned", 1.0)):
        (folder / name).mkdir()
        save_file({key: value + shift for key, value in base.items()}, folder / name / "model.safetensors")


def test_fusing_ones_own_checkpoints(tmp_path: Path) -> None:
    make_pair(tmp_path)
    exec(code_block("Dare(").replace("path/to", str(tmp_path)), {})
    base, fused = (load_file(tmp_path / name / "model.safetensors") for name in ("pretrained", "out"))
    assert fused.keys() == base.keys()
    changed = sum(int((fused[name] != base[name]).sum()) for name in base)
    assert 0 < changed < 28


def test_the_example_of_a_new_method(tmp_path: Path) -> None:
    make_pair(tmp_path)
    known = {"torch": torch, "dataclass": dataclass, "ClassVar": ClassVar, "EvidenceKind": EvidenceKind, "Fused": Fused}
    exec(code_block("class Midpoint"), known)
    fuse(tmp_path / "pretrained", tmp_path / "finetuned", known["Midpoint"](weight=0.25), tmp_path / "out")
    base, fused = (load_file(tmp_path / name / "model.safetensors") for name in ("pretrained", "out"))
    for name in base:
        assert torch.allclose(fused[name], base[name] + 0.25)


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README


def test_every_file_and_target_it_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile, f"make {target}"
    for path in re.findall(r"`((?:tailor|evaluation|experiments|conf|tests)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (experiments[\w.]*)", README):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
