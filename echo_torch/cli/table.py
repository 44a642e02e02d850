"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Format rows of cells as lines with aligned columns. The first row is usually the headings.

    Args:
        rows: all with one cell per column.
        align: one character per column, ``"<"`` for left or ``">"`` for right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(zip(align, widths, strict=True))
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True)).rstrip()
        for row in rows
    )
