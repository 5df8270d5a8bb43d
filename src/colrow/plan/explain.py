"""A plan as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colrow.plan.plan import Plan


def explain(plan: Plan) -> str:
    """Axes with their cuts, the actions, and what stayed whole."""
    lines = [f"plan over {plan.ranks} ranks"]
    for axis in plan.axes.values():
        members = [name for name, sharding in plan.parameters.items() if sharding.axis == axis.name]
        lines.append(
            f"  axis {axis.name}: {axis.cut.units} units cut {list(axis.cut.counts)}, "
            f"{len(members)} parameters, such as {members[0] if members else 'none'}"
        )
    lines.append(
        f"  {len(plan.entries)} entries (all-reduce backward), {len(plan.exits)} exits and "
        f"{len(plan.lookups)} lookups (all-reduce forward)"
    )
    if plan.partial_parameters:
        lines.append(f"  {len(plan.partial_parameters)} replicated parameters with summed gradients")
    lines.extend(f"  note: {note}" for note in plan.notes)
    return "\n".join(lines)
