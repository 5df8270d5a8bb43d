"""A table of axes for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

from colrow.axes.result import Axes, Axis

MEMBERS_SHOWN = 6


def render(axes: Axes) -> str:
    """One line for each kind of axis that has parameters, alike ones of repeated layers together.

    Then the operators that had no rule.
    """
    kinds: dict[tuple[str, ...], list[Axis]] = {}
    for axis in axes.all:
        if axis.parameters:
            kinds.setdefault((str(axis.size), *_names(axis), _verdict(axis)), []).append(axis)
    rows = [("axis", "units", "count", "used as", "members", "may be sharded")]
    for group in kinds.values():
        axis = group[0]
        names = _names(axis)
        more = f", and {len(names) - MEMBERS_SHOWN} more" if len(names) > MEMBERS_SHOWN else ""
        members = ", ".join(names[:MEMBERS_SHOWN]) + more
        rows.append((str(axis.index), str(axis.size), str(len(group)), _uses(axis), members, _verdict(axis)))
    lines = _columns(rows)
    for name, operations in axes.unknown.items():
        lines.append(f"no rule for {name} ({len(operations)} times): its dimensions are not sharded")
    return "\n".join(lines)


def _names(axis: Axis) -> list[str]:
    """Parameters with their dimension, numbers of layers left out, each once."""
    names = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name) + f"[{at}]" for name, at in axis.parameters)
    return list(dict.fromkeys(names))


def _uses(axis: Axis) -> str:
    uses = {
        "contracted": axis.contractions,
        "looked up": axis.lookups,
        "iota": axis.iotas,
        "loss": axis.losses,
    }
    return ", ".join(use for use, operations in uses.items() if operations) or "kept"


def _verdict(axis: Axis) -> str:
    if axis.legal:
        return "yes"
    reason = axis.illegal[0]
    name = f" ({reason.operation.name})" if reason.operation is not None else ""
    return f"no: {reason.text}{name}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
