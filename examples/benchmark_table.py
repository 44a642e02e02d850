"""How the benchmarks print what they measure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Table:
    """Prints its rows as they come, aligned, and keeps them.

    ``columns`` maps each heading to the key of its cells in a row and their format. Cells are right-aligned to the
    width of the heading.
    """

    def __init__(self, title: str, columns: dict[str, tuple[str, str]]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._columns = columns
        print(f"\n{title}\n{'  '.join(columns)}", flush=True)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        cells = (format(row[key], form).rjust(len(head)) for head, (key, form) in self._columns.items())
        print("  ".join(cells), flush=True)


def filled(table: Table, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        table.add(row)
    return table.rows
