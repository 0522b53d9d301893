"""Checks of configuration values that Hydra passes on as they are: their types, ranges and choices."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from experiments.errors import ConfigError


def whole(owner: object, *names: str, least: int = 1) -> None:
    """Raises ConfigError unless the fields are whole numbers of at least ``least``."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            _refuse(owner, name, f"a whole number of at least {least}")


def real(owner: object, *names: str, least: float = 0.0, most: float = math.inf, above: bool = False) -> None:
    """Raises ConfigError unless the fields are finite numbers in [least, most]; with ``above``, more than ``least``."""
    for name in names:
        value = getattr(owner, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not least <= value <= most or (above and value == least):
            bounds = f"more than {least:g}" if above else f"at least {least:g}"
            _refuse(owner, name, f"a number of {bounds}" + (f" and at most {most:g}" if most < math.inf else ""))


def boolean(owner: object, *names: str) -> None:
    """Raises ConfigError unless the fields are true or false."""
    for name in names:
        if not isinstance(getattr(owner, name), bool):
            _refuse(owner, name, "true or false")


def one_of(owner: object, name: str, choices: Collection[Any]) -> None:
    """Raises ConfigError unless the field is one of ``choices``."""
    if getattr(owner, name) not in choices:
        _refuse(owner, name, f"one of {', '.join(map(str, choices))}")


def _refuse(owner: object, name: str, wanted: str) -> None:
    raise ConfigError(f"{type(owner).__name__}.{name}: {getattr(owner, name)!r} is not {wanted}")
