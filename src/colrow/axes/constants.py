"""Values that follow from no input and no parameter, such as the slopes of ALiBi: made whole, then sliced.

How such a value was put together says nothing of how it may be cut: six slopes that are four and two
concatenated are still six. So where its making takes dimensions apart or joins them, the result is taken for
something new.
"""

from __future__ import annotations

import torch

from colrow.axes.context import RuleContext
from colrow.trace.records import Operation, Trace

_KEEPING = frozenset(
    f"aten.{name}"
    for name in (
        "unsqueeze",
        "expand",
        "transpose",
        "permute",
        "t",
        "clone",
        "detach",
        "alias",
        "lift_fresh",
        "_to_copy",
    )
)
"""Besides those that work on each element: operators that keep each dimension as it is."""


class Constants:
    """Which operations of a trace make constants from constants, and what varies within itself."""

    def __init__(self, trace: Trace) -> None:
        written = {
            value.storage
            for operation in trace.operations
            for value in operation.outputs
            if any(value is given for given in operation.inputs)
        }
        constants = {
            value.index
            for value in trace.values
            if value.source.kind == "constant" and value.storage not in written and not value.differentiable
        }
        self._operations: set[int] = set()
        # by index: constants whose content depends on the place within them
        self._varying = {index for index in constants if any(size > 1 for size in trace.values[index].shape)}
        for operation in trace.operations:
            random = torch.Tag.nondeterministic_seeded in operation.function.tags
            reads_constants = all(value.index in constants for value in operation.inputs)
            if reads_constants and not random and all(v.storage not in written for v in operation.outputs):
                self._operations.add(operation.index)
                constants.update(value.index for value in operation.outputs)

    def is_new(self, operation: Operation) -> bool:
        """Whether the results of ``operation`` are to be taken for new constants.

        Only if what it reads goes into constants alone: else that would be needed both whole and cut.
        """
        if operation.index not in self._operations or operation.name in _KEEPING:
            return False
        if torch.Tag.pointwise in operation.function.tags:
            return False
        return any(value.index in self._varying for value in operation.inputs) and all(
            use.index in self._operations for value in operation.inputs for use in value.uses
        )

    def follow(self, operation: Operation, depends_on_index: bool) -> None:
        """Note what ``operation`` made; ``depends_on_index`` if its rule says so of the content."""
        if operation.index in self._operations and (
            depends_on_index or any(value.index in self._varying for value in operation.inputs)
        ):
            self._varying.update(value.index for value in operation.outputs)


def make_anew(op: RuleContext) -> None:
    """New factors for all results; their content depends on the index."""
    for output, value in enumerate(op.outputs):
        dimensions = op.atoms(value.shape)
        for factor in dimensions:
            op.iota(factor)
        op.set_output(dimensions, output)
