"""Which values a rank holds a part of, and which it holds whole although a chosen axis runs through them.

A value is *born whole* if its content depends on the position along the axis (the slopes of ALiBi, an
``arange`` over heads) or if it comes from outside (an input). It is computed whole on every rank and sliced
where it meets a value of which ranks hold parts. Values beyond a *border* are whole again: there the parts
are gathered, or go into a loss that works on parts.
"""

from __future__ import annotations

from collections import defaultdict

from colrow.plan.selection import Selection
from colrow.trace.records import Operation, Value


class States:
    """The state of every value under a selection.

    Attributes:
        selection: what is cut.
        borders: values that are parts where they are made and whole for all who read them.
        slices: values that are born whole, with the operations that read parts of them.
    """

    def __init__(self, selection: Selection, borders: set[int]) -> None:
        self.selection, self.borders = selection, borders
        self.slices: dict[int, list[Operation]] = defaultdict(list)
        self._local: set[int] = set()
        self._find()

    def is_local(self, value: Value) -> bool:
        """Whether a rank that reads the value has a part of it only."""
        return value.index in self._local and value.index not in self.borders

    def made_local(self, value: Value) -> bool:
        """Whether a rank makes a part of the value only."""
        return value.index in self._local

    def _find(self) -> None:
        selection = self.selection
        state: dict[int, str] = {}
        for value in selection.trace.values:
            if value.source.kind != "result" and selection.is_cut(value):
                state[value.index] = "local" if value.source.kind in ("parameter", "buffer") else "whole"
        for operation in selection.trace.operations:
            inputs = [value for value in operation.inputs if selection.is_cut(value)]
            kinds = {
                "whole" if value.index in self.borders else state.get(value.index, "local")
                for value in inputs
            }
            if selection.counts(operation) or ("whole" in kinds and "local" not in kinds):
                found = "whole"
            else:
                found = "local" if "local" in kinds else "open"
            for value in operation.outputs:
                if selection.is_cut(value) and state.get(value.index) != "local":
                    state[value.index] = found
        self._settle(state)
        self._local = {index for index, found in state.items() if found == "local"}
        for operation in selection.trace.operations:
            self._find_slices(operation)

    def _settle(self, state: dict[int, str]) -> None:
        """Values made of numbers alone, such as zeros, are whole where they meet what is whole."""
        for operation in reversed(self.selection.trace.operations):
            for value in operation.inputs:
                if state.get(value.index) == "open" and any(
                    state.get(result.index) == "whole" for result in operation.outputs
                ):
                    state[value.index] = "whole"
        for index, found in state.items():
            if found == "open":
                state[index] = "local"

    def _find_slices(self, operation: Operation) -> None:
        cut = [value for value in operation.inputs if self.selection.is_cut(value)]
        if not any(self.is_local(value) for value in cut):
            return
        for value in cut:
            if not self.is_local(value) and operation not in self.slices[value.index]:
                self.slices[value.index].append(operation)
        self.slices = defaultdict(list, {index: found for index, found in self.slices.items() if found})
