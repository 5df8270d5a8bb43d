"""Numbers that a program reads out of tensors, to do something else with them: they have to be whole."""

from __future__ import annotations

from colrow.plan.exits import Reductions
from colrow.plan.states import States


def check_reads(states: States, reductions: Reductions) -> None:
    """Nothing that a program reads is a part of it, or of a sum.

    Raises:
        CannotPlaceError: if something is.
    """
    for value in states.selection.trace.values:
        if value.read is None:
            continue
        position, place = value.read
        begin, end = reductions.partial.get(value.index, (position, position))
        if states.is_local(value) or begin < position <= end:
            raise states.selection.cannot(f"the program reads its numbers at {place}", value, value.producer)
