"""What others may read: numbers that a program reads out of tensors, and tensors that it leaves in modules.

All of it is whole.
"""

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


def check_kept(states: States) -> None:
    """Nothing that a forward leaves in a module is a part of what it would be.

    What it leaves in the caller's lists and caches may be: the model goes on with it in its next call.

    Raises:
        CannotPlaceError: if something is.
    """
    for one in states.selection.trace.kept:
        if not one.given and states.is_local(one.value):
            raise states.selection.cannot(
                f"{one.label} would get a part of it", one.value, one.value.producer
            )
