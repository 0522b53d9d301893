"""The code that a result depends on: modules of this project and all that they import, as they were at start-up."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("tailor", "evaluation", "experiments")


class Module(NamedTuple):
    sha256: str
    imports: frozenset[str]


def closure(modules: Iterable[str]) -> tuple[str, ...]:
    """``modules`` and every module of this project that they import, directly or not, sorted."""
    found: set[str] = set()
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name not in _MODULES:
            raise ModuleNotFoundError(f"{name} is no module of {', '.join(PACKAGES)} in {REPOSITORY}")
        if name not in found:
            found.add(name)
            todo += _MODULES[name].imports
    return tuple(sorted(found))


def source_hash(modules: Iterable[str]) -> str:
    """sha256 over the code of the `closure`."""
    digest = hashlib.sha256()
    for name in closure(modules):
        digest.update(f"{name}\0{_MODULES[name].sha256}\0".encode())
    return digest.hexdigest()


def _read() -> Iterator[tuple[str, Module]]:
    paths = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
    }
    for name, path in paths.items():
        code = path.read_bytes()
        imported = {found for node in ast.walk(ast.parse(code)) for found in _imported(node) if found in paths}
        yield name, Module(hashlib.sha256(code).hexdigest(), frozenset(imported))


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


# Read once, when the process starts: what a file says hours later is not the code that runs.
_MODULES = MappingProxyType(dict(_read()))
