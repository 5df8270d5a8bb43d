"""Tables and quantities as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "  ") -> list[str]:
    """Rows as lines with aligned columns.

    Args:
        rows: all of one length.
        right: numbers of the columns that are aligned to the right.
        indent: what every line begins with.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (
            indent
            + "  ".join(
                cell.rjust(width) if number in right else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in rows
    ]


def size(count: float, unit: str = "B") -> str:
    """A quantity in steps of 1000: ``1.5 GB``, ``670 kB``, ``12 B``."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(count) < 999.5 or prefix == "T":
            break
        count /= 1000
    digits = 0 if prefix == "" or count >= 99.95 else 1
    return f"{count:.{digits}f} {prefix}{unit}".rstrip()


def shape(sizes: Sequence[int]) -> str:
    """``2 x 10 x 4096``; a single number is ``scalar``."""
    return " x ".join(map(str, sizes)) or "scalar"


def counts(numbers: Sequence[int | tuple[int, ...]]) -> str:
    """Numbers of consecutive ranks, equal ones together: ``3 3 2``, ``10667 x 2, 10666``."""
    texts = [str(one) if isinstance(one, int) else f"({', '.join(map(str, one))})" for one in numbers]
    if len(numbers) <= 4:
        return " ".join(texts)
    runs = [(text, len(list(run))) for text, run in groupby(texts)]
    return ", ".join(f"{text} x {times}" if times > 1 else text for text, times in runs)
