"""Measurements as a table on the console and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Prints rows of the same columns."""
    from rich.table import Table

    from experiments.console import console

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()))
    console(width=200, markup=False).print(table)


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes rows of the same columns, under their names."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
