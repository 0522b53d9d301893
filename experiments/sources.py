"""The code that a result depends on: modules of this project and all that they import, as they were at start-up."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("tailor", "evaluation", "experiments")


def closure(modules: Iterable[str]) -> tuple[str, ...]:
    """``modules`` and every module of this project that they import, directly or not, sorted."""
    found: set[str] = set()
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name not in _CODE:
            raise ModuleNotFoundError(f"{name} is no module of {', '.join(PACKAGES)} in {REPOSITORY}")
        if name not in found:
            found.add(name)
            todo += _imports(name)
    return tuple(sorted(found))


def source_hash(modules: Iterable[str]) -> str:
    """sha256 over the code of the `closure`."""
    digest = hashlib.sha256()
    for name in closure(modules):
        digest.update(f"{name}\0{hashlib.sha256(_CODE[name]).hexdigest()}\0".encode())
    return digest.hexdigest()


@cache
def _imports(name: str) -> frozenset[str]:
    """The modules of this project that a module imports, wherever in its code."""
    nodes = ast.walk(ast.parse(_CODE[name]))
    return frozenset(found for node in nodes for found in _imported(node) if found in _CODE)


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


# Read when the process starts: what a file says hours later is not the code that runs.
_CODE = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path.read_bytes()
    for package in PACKAGES
    for path in (REPOSITORY / package).rglob("*.py")
}
