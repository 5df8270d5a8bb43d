"""What has turned out to be impossible while a sequence was followed: the search then begins again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from colrow.plan.sequence.cut import Way
from colrow.trace.records import Operation, Trace, Value


class AgainError(Exception):
    """Something cannot be cut, and has been noted: begin again without it."""


class Noted:
    """Sets that only grow, so that a search ends.

    Args:
        trace: of all runs.
        others: indices of values that are parts of another sequence.

    Attributes:
        refused: indices of calls that get the whole.
        whole: indices of values that must not be parts.
        ended: indices of parts that nobody reads as such.
        misused: indices of parts whose sizes were taken for those of the whole.
        taken: indices of whole values of which the parts are taken where they are first read.
        left: indices of those where that is no use.
        impossible: keys of places at which nothing can be done.
    """

    def __init__(self, trace: Trace, others: Iterable[int]) -> None:
        self.refused: set[int] = set()
        self.whole = {*others, *(one.value.index for one in trace.kept)}
        self.ended: set[int] = set()
        self.misused: set[int] = set()
        self.taken: set[int] = set()
        self.left: set[int] = set()
        self.impossible: set[tuple[object, ...]] = set()
        for written in trace.written:
            found = written.finding
            if found is None or not found.is_derivative:
                self.whole.update(value.index for value in (*written.inputs, *written.outputs))
                self.refuse(trace.operations[written.first : written.last])
        self._keep_guessed_whole(trace)

    def _keep_guessed_whole(self, trace: Trace) -> None:
        """Parts do not pass through the code of a module that was guessed at: it may take another course."""
        for module in trace.modules:
            if module.parent is not None and module.parent.path in trace.guessed:
                self.whole.update(value.index for _, value in (*module.inputs, *module.outputs))
        self.refuse(
            operation
            for operation in trace.operations
            if operation.module is not None and operation.module.path in trace.guessed
        )

    def refuse(self, operations: Iterable[Operation]) -> None:
        """The calls of these operations get the whole."""
        self.refused.update(operation.call.index for operation in operations if operation.call is not None)

    def keep_whole(self, values: Iterable[Value]) -> None:
        """The values must not be parts: what makes them gets the whole. Taken ones are left."""
        for value in values:
            if value.index in self.taken:
                self._leave(value)
            self.whole.add(value.index)
            self.ended.discard(value.index)

    def give_up(self, value: Value, operations: Iterable[Operation], way: Way) -> NoReturn:
        """The value cannot go ``way`` to these operations.

        Raises:
            AgainError: always.
        """
        if way != "slice":
            self.keep_whole([value])
        elif value.index in self.taken:
            self._leave(value)
        else:
            self.refuse(operations)
        raise AgainError

    def _leave(self, value: Value) -> None:
        self.taken.discard(value.index)
        self.left.add(value.index)
