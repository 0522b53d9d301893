"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console


def console(*, width: int, markup: bool = True) -> Console:
    """A console for tables: as wide as the terminal, but ``width`` columns where output is piped.

    rich would squeeze a piped table into 80 columns.
    """
    return Console(width=None if sys.stdout.isatty() else width, highlight=False, markup=markup)
