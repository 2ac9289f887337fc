"""Formats rows of text as a table: the first column to the left, the others to the right."""

from collections.abc import Sequence


def format_rows(rows: Sequence[tuple[str, ...]]) -> str:
    """`rows`, the first of which is the heading, with columns as wide as they need to be."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
