"""Whether what was found on the way holds: numbers, writes, passes of one place."""

from __future__ import annotations

from collections import defaultdict

from colrow.parallel.context.found import Found
from colrow.parallel.context.plan import At
from colrow.parallel.context.steps import refusal
from colrow.plan.selection import Selection
from colrow.plan.sequence.cut import Crossing, PartStates
from colrow.plan.sequence.numbers import Numbers
from colrow.plan.sites import Sites, Where
from colrow.trace.records import FunctionCall, Operation, Trace, Value


class Checks:
    """Of one attempt.

    Args:
        found: what was found.
        trace: of the model.
    """

    def __init__(self, found: Found, trace: Trace) -> None:
        self._found = found
        self._storages: dict[int, list[Value]] = defaultdict(list)
        for value in trace.values:
            self._storages[value.storage].append(value)
        self._written = {
            index: one
            for one in trace.written
            if one.kind != "parameter hook"
            for index in range(one.first, max(one.last, one.first + 1))
        }

    def course(self, step: FunctionCall | Operation, operations: tuple[Operation, ...]) -> None:
        """What is done with tokens must not be guessed, nor hidden in a backward of the program's own."""
        module = step.module
        if module is not None and module.path in self._found.trace.guessed:
            raise refusal("what is done with tokens depends on their numbers, or on chance", step)
        for operation in operations:
            written = self._written.get(operation.index)
            if written is not None and (written.finding is None or not written.finding.is_derivative):
                raise refusal(f"the backward of {written.name} may mix tokens", step)

    def written_by(self, operations: tuple[Operation, ...]) -> set[int]:
        """Indices of the values that have the memory into which these write."""
        written = [
            one for each in operations for one in each.outputs if any(one is other for other in each.inputs)
        ]
        return {each.index for value in written for each in self._storages[value.storage]}

    def writes(self, step: FunctionCall | Operation, operations: tuple[Operation, ...]) -> None:
        """What is written into is cut as what is written, and so is all that shares its memory."""
        for operation in operations:
            written = [one for one in operation.outputs if any(one is other for other in operation.inputs)]
            if not written or not any(one.index in self._found.cut for one in operation.inputs):
                continue
            for value in written:
                bad = [
                    one
                    for one in self._storages[value.storage]
                    if one.index <= max(each.index for each in operation.outputs)
                    and one.index not in self._found.cut
                    and self._found.axis.has(one)
                ]
                if bad or value.index not in self._found.cut:
                    raise refusal(f"{step.name} writes a rank's tokens into what is whole", step)

    def numbers(self, selection: Selection) -> None:
        """Calls with numbers give the parts of their results on parts; no number is used for another."""
        crossings = [
            Crossing(
                value,
                tuple(self._found.trace.operations[call.first] for _, call in uses),
                "slice",
                0,
                tuple(Where(call.module, (), False, call) for _, call in uses),
            )
            for uses in self._found.arguments.values()
            for value in [uses[0][0]]
        ]
        states = PartStates(selection, self._found.cut.keys(), crossings)
        numbers = Numbers(self._found.trace, states, self._found.cut.keys())
        for call in self._found.to_try:
            if numbers.fails(call):
                raise refusal(f"{call.name} with these numbers does not treat every token by itself", call)

    def passes(self, done: dict[At, set[int]], sites: Sites) -> None:
        """All passes of a place in the program are changed alike."""
        for at, passes in done.items():
            calls = [self._found.trace.calls[index] for index in passes]
            others = [one for one in sites.alike(calls[0]) if one.index not in passes]
            if others:
                raise refusal(f"{at.call.function} is given a rank's tokens in some passes only", others[0])
