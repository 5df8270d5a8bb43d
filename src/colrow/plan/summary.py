"""What a user should know of a derived plan without asking: one sentence, if there is something to know."""

from __future__ import annotations

from collections.abc import Mapping

from colrow.plan.patterns import merge_texts
from colrow.plan.plan import Plan
from colrow.trace.recorder import GUESSED

WORTH_SAYING = 0.01
"""Share of all parameters that stays whole below which nothing is said: norms, biases, small tables."""
_NAMED = 3
"""How many parameters are named."""


def summary(plan: Plan, sizes: Mapping[str, int]) -> str | None:
    """How much stays whole on every rank and how much was guessed; ``None`` if that is next to nothing.

    Args:
        plan: as it was derived.
        sizes: elements of the model's parameters by name, tied ones once.
    """
    whole = sorted((name for name in sizes if name not in plan.parameters), key=lambda name: -sizes[name])
    share = sum(sizes[name] for name in whole) / max(1, sum(sizes.values()))
    guesses = sum(GUESSED in note for note in plan.notes)
    parts = []
    if share >= WORTH_SAYING:
        largest = merge_texts(whole)[:_NAMED]
        names = ", ".join(f"{one} (x {one.count})" if one.count > 1 else str(one) for one in largest)
        more = "" if len(largest) == len(merge_texts(whole)) else ", ..."
        parts.append(f"{share:.0%} of the parameters stay whole on every rank ({names}{more})")
    if guesses:
        what = "1 guess" if guesses == 1 else f"{guesses} guesses"
        parts.append(f"the plan rests on {what} of what the program reads from data")
    if not parts:
        return None
    return "; ".join(parts) + ". The plan's notes say why: print(colrow.state_of(model).plan.explain())"
