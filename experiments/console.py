"""Where tables are printed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, width: int, markup: bool = True) -> Console:
    """A console for tables: as wide as the terminal, but ``width`` columns where output is piped.

    rich would squeeze a piped table into 80 columns.
    """
    from rich.console import Console  # not before it is needed: --help must answer at once

    return Console(width=None if sys.stdout.isatty() else width, highlight=False, markup=markup)


def size(count: int) -> str:
    """Bytes as people write them, in powers of 1000."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
