"""Whose gradients are partial: of what meets parts without being cut itself, such as a norm's weight."""

from __future__ import annotations

from collections import defaultdict

from colrow.plan.sequence.cut import SequenceCut
from colrow.plan.sequence.facts import Facts
from colrow.plan.sequence.follow import Parts
from colrow.plan.sequence.noted import AgainError, Noted
from colrow.trace.records import Operation, Value


class PartialGradients:
    """Adds to ``found`` the parameters and other values whose gradients are summed.

    Arguments as of :class:`colrow.plan.sequence.crossings.Crossings`.
    """

    def __init__(self, facts: Facts, noted: Noted, parts: Parts, found: SequenceCut) -> None:
        self._facts, self._noted, self._parts, self._found = facts, noted, parts, found
        self._partial: dict[int, list[Operation]] = defaultdict(list)

    def run(self) -> None:
        """Add them.

        Raises:
            AgainError: if a parameter would have to be read for parts and for wholes by one module.
        """
        reading = set(self._parts.operations)
        for operation in reversed(self._facts.trace.operations):
            if operation.index in self._parts.operations:
                self._note(operation)
                continue
            results = [value for value in operation.outputs if self._partial.get(value.index)]
            if results and self._passes(operation, results):
                reading.add(operation.index)
                for value in results:
                    del self._partial[value.index]
                self._note(operation)
        # what a layer adds after it has taken its part
        for index, (bias, module) in self._facts.biases.items():
            if index in self._found.scattered:
                added = [use for use in bias.uses if module.first <= use.index < module.last]
                self._partial[bias.index] += added
                reading.update(use.index for use in added)
        for index, operations in sorted(self._partial.items()):
            value = self._facts.trace.values[index]
            if not operations:
                continue
            if value.source.kind == "parameter":
                self._check_reader(value, operations, reading)
                self._found.partial.append((value, tuple(dict.fromkeys(operations))))
            else:
                self._found.entered.append((value, tuple(operations)))

    def _note(self, operation: Operation) -> None:
        """What the operation reads, and is not cut, has a partial gradient from it."""
        for value in dict.fromkeys(operation.inputs):
            if value.differentiable and not self._is_cut(value):
                self._partial[value.index].append(operation)

    def _is_cut(self, value: Value) -> bool:
        return value.index in self._parts.cut or self._facts.has(value)

    def _passes(self, operation: Operation, results: list[Value]) -> bool:
        """Whether all gradients that come to the operation are partial and may go on to what it reads."""
        if self._facts.is_in_region(operation) or len(operation.outputs) != 1 or operation.call is None:
            return False
        if any(value in operation.inputs for value in operation.outputs):
            return False
        if any(map(self._is_cut, operation.inputs)):
            return False
        (value,) = results
        return value.index not in self._facts.outputs and all(
            use in self._partial[value.index] or not any(one.differentiable for one in use.outputs)
            for use in value.uses
        )

    def _check_reader(self, parameter: Value, operations: list[Operation], reading: set[int]) -> None:
        """A module that reads a parameter reads it for parts only."""
        readers = {operation.module.path for operation in operations if operation.module is not None}
        for use in parameter.uses:
            if use.module is None or use.module.path not in readers or use.index in reading:
                continue
            if any(one.differentiable for one in use.outputs):
                self._noted.refuse(operations)
                self._noted.keep_whole(
                    self._facts.trace.values[index]
                    for index, (bias, _) in self._facts.biases.items()
                    if bias is parameter and index in self._parts.cut
                )
                raise AgainError
