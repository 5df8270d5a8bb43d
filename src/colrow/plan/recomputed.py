"""Which collectives of a forward pass happen again in the backward pass, by activation checkpointing."""

from __future__ import annotations

from colrow.plan.flow import GradientFlow
from colrow.trace.records import ModuleCall, Operation, Recomputation, Trace


class Recomputed:
    """What backward passes run again.

    Args:
        trace: of all runs.
        flow: where gradients flow: what none flows through is not run again.
    """

    def __init__(self, trace: Trace, flow: GradientFlow) -> None:
        self._parts = [
            one for one in trace.recomputed if any(map(flow.through, trace.operations[one.first : one.last]))
        ]

    def times(self, caller: ModuleCall | None, after: int) -> int:
        """How often something is run again.

        Args:
            caller: the module call whose code does it, or calls the module that does it at its border.
            after: index of the last operator before it.
        """
        return sum(one.first <= after < one.repeated and _is_inside(caller, one) for one in self._parts)

    def is_apart(self, operation: Operation) -> bool:
        """Whether gradients flow through the operator in a backward pass of its own."""
        return any(one.reentrant and one.first <= operation.index < one.last for one in self._parts)


def _is_inside(caller: ModuleCall | None, part: Recomputation) -> bool:
    """Whether the code of ``caller`` may run within the function, which the code of ``part.module`` calls."""
    while caller is not None and caller is not part.module:
        caller = caller.parent
    return caller is part.module
