"""Following partial sums through operators that are linear in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from colrow.plan.states import States
from colrow.trace.records import ModuleCall, Operation, Value

_ZEROS = ("aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten.zero")
_COPIES = (
    "aten.view",
    "aten._unsafe_view",
    "aten.expand",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten._to_copy",
    "aten.detach",
    "aten.clone",
    "aten.slice",
    "aten.alias",
    "aten.t",
    "aten.transpose",
    "aten.permute",
    "aten.select",
)
_SHAPES = ("aten.zeros_like", "aten.empty_like", "aten.ones_like", "aten.full_like", "aten.new_zeros")


@dataclass
class Spread:
    """Where partial sums that begin in a range of operations get to within it.

    Attributes:
        linear: whether they meet only operators that are linear in them.
        values: those that are partial sums, with the operation after which they are.
        once: parameters added to partial sums, with the call of the module that does it.
    """

    linear: bool = True
    values: dict[int, tuple[Value, int]] = field(default_factory=dict)
    once: list[tuple[Value, ModuleCall]] = field(default_factory=list)


class Linearity:
    """Answers where partial sums get to under a selection."""

    def __init__(self, states: States) -> None:
        self._states = states
        self._selection = states.selection
        self._registry = states.selection.axes.registry
        self._writes: dict[int, list[int]] = defaultdict(list)
        for operation in self._selection.trace.operations:
            if operation.function._schema.is_mutable:
                for value in operation.outputs:
                    if value in operation.inputs:
                        self._writes[value.storage].append(operation.index)

    def is_source(self, operation: Operation) -> bool:
        """Whether the operation's result is a partial sum because it sums over parts."""
        return self._selection.contracts(operation) and any(
            self._states.is_local(value) for value in operation.inputs
        )

    def spread(self, operations: Iterable[Operation]) -> Spread:
        """Follow all partial sums that begin in ``operations``, consecutive ones of the trace."""
        spread = Spread()
        for operation in operations:
            partial = [value for value in operation.inputs if value.index in spread.values]
            source = self.is_source(operation)
            if not partial and not source:
                continue
            if operation.name in _SHAPES and not source:
                continue
            allowed = self._source_is_linear(operation, partial, spread) if source else False
            if not source:
                allowed = any(
                    self._is_linear(operation, group, partial, spread)
                    for group in self._registry.linear(operation)
                )
            if not allowed:
                spread.linear = False
                return spread
            for value in operation.outputs[:1]:
                spread.values.setdefault(value.index, (value, operation.index))
        return spread

    def _source_is_linear(self, operation: Operation, partial: list[Value], spread: Spread) -> bool:
        if partial:
            return False
        rule = self._registry.find(operation.function)
        assert rule is not None
        return all(
            self._once(operation, operation_argument(operation, name), spread) for name in rule.addends
        )

    def _is_linear(
        self, operation: Operation, group: tuple[str, ...], partial: list[Value], spread: Spread
    ) -> bool:
        """Whether all partial inputs are among the arguments ``group``, and nothing else is."""
        members: list[Any] = []
        for name in group:
            given = operation_argument(operation, name)
            members += given if isinstance(given, list | tuple) else [given]
        inside = [one for one in members if isinstance(one, Value)]
        if any(all(value is not one for one in inside) for value in partial):
            return False
        outside = [one for one in operation.inputs if all(one is not other for other in inside)]
        if any(one.index in spread.values for one in outside):
            return False
        return all(
            (isinstance(one, Value) and one.index in spread.values) or self._once(operation, one, spread)
            for one in members
        )

    def _once(self, operation: Operation, addend: Any, spread: Spread) -> bool:
        """Whether something may be added to a partial sum: it is zero, or a parameter that one rank adds."""
        if not isinstance(addend, Value):
            return addend is None or (isinstance(addend, int | float) and addend == 0)
        if self._is_zero(addend, operation.index):
            return True
        root = addend
        while root.source.kind == "result" and root.producer is not None and root.producer.name in _COPIES:
            if root.index in spread.values:
                return False
            root = root.producer.inputs[0]
        module = operation.module
        if root.source.kind != "parameter" or module is None or self._states.selection.is_cut(root):
            return False
        if (root, module) not in spread.once:
            spread.once.append((root, module))
        return True

    def _is_zero(self, value: Value, before: int) -> bool:
        """Whether a value holds zeros until the operation ``before``."""
        if any(index < before for index in self._writes.get(value.storage, ())):
            return False
        producer = value.producer
        while producer is not None and producer.name in _COPIES and producer.inputs:
            value = producer.inputs[0]
            if any(index < before for index in self._writes.get(value.storage, ())):
                return False
            producer = value.producer
        if producer is None:
            return False
        if producer.name in ("aten.full", "aten.new_full", "aten.full_like"):
            return operation_argument(producer, "fill_value") == 0
        return producer.name.rstrip("_") in _ZEROS


def operation_argument(operation: Operation, name: str) -> Any:
    """An argument of an operation by its name in the schema; its default where it was not given."""
    for position, argument in enumerate(operation.function._schema.arguments):
        if argument.name == name:
            if position < len(operation.arguments):
                return operation.arguments[position]
            return operation.keywords.get(name, argument.default_value)
    return None
