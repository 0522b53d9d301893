"""The three packages depend on each other in one direction alone, and import nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "tailor": {"evaluation", "experiments", "hydra", "omegaconf", "transformers", "datasets", "wandb", "pandas"},
    "evaluation": {"tailor", "experiments", "hydra", "omegaconf", "transformers", "datasets", "wandb", "torch"},
}
ONLY_WORLD = {"experiments/stages/pretrain.py", "experiments/worlds"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_depend_in_one_direction(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = {name for name in imported(path) if name.partition(".")[0] in FORBIDDEN[package]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_only_pretraining_knows_the_embedded_world() -> None:
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if any(name.startswith(place) for place in ONLY_WORLD):
            continue
        wrong = {module for module in imported(path) if module.startswith("experiments.worlds")}
        assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("experiments.run", ("torch", "transformers", "datasets", "wandb", "matplotlib")),
        ("evaluation.score", ("torch", "transformers", "pycocoevalcap")),
        ("tailor.fuse", ("transformers", "hydra")),
    ],
)
def test_imports_stay_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
