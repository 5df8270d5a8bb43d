"""What is known of regions and of a sequence before it is found out how far the sequence can stay cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set

from colrow.plan.exits import Reductions
from colrow.plan.gradients import Summation
from colrow.plan.selection import Selection
from colrow.plan.sequence.cut import dimension_of
from colrow.plan.sites import Sites, Where
from colrow.plan.states import States
from colrow.trace.records import ModuleCall, Operation, Value


class Facts:
    """Of one sequence.

    Args:
        states, reductions, summations: of the selection whose regions there are.
        selection: of the sequence's axes.
        biases: those that a linear layer adds to what leaves a region, by the value that it gives, with its
            call.
        tables: paths of the embeddings whose rows may become parts.

    Attributes:
        sources: values that leave regions, those of one place of the plan together.
        outputs: indices of what the model gives.
        entering: indices of the values all of whose gradients are summed where they are read.
    """

    def __init__(
        self,
        states: States,
        reductions: Reductions,
        summations: list[Summation],
        selection: Selection,
        biases: Mapping[int, tuple[Value, ModuleCall]],
        tables: Set[str],
    ) -> None:
        self.states, self.selection, self.biases = states, selection, biases
        self.trace, self.axes = selection.trace, selection.axes
        self.sites = Sites(selection)
        self.outputs = {value.index for _, root in self.trace.runs for _, value in root.outputs}
        self.entering = {one.value.index for one in summations if one.everywhere}
        self._reductions = reductions
        self._atoms = {atom.index for one in selection.chosen for atom in one.candidate.atoms}
        self._summed = {
            (one.value.index, operation.index) for one in summations for operation in one.operations
        }
        self._regions = [self._works_on_parts(operation) for operation in self.trace.operations]
        self._known: dict[int, bool] = {}
        self.sources = self._find_sources(tables)
        self._ranges = self._find_ranges()

    def has(self, value: Value) -> bool:
        """Whether the sequence runs through the value."""
        if value.index not in self._known:
            self._known[value.index] = any(atom.index in self._atoms for atom in self.axes.atoms(value))
        return self._known[value.index]

    def dimension(self, value: Value) -> int | None:
        """The one dimension of the value that is the sequence and nothing else; ``None`` if there is none."""
        return dimension_of(self.selection, value)

    def is_partial(self, value: Value, operation: Operation) -> bool:
        """Whether the value is a partial sum of a region where the operation reads or makes it."""
        return self._reductions.is_partial(value, operation)

    def enters(self, value: Value, operation: Operation) -> bool:
        """Whether a region begins where the operation reads the value."""
        return (value.index, operation.index) in self._summed

    def is_in_region(self, operation: Operation) -> bool:
        """Whether the operation works on parts or partial sums of another axis."""
        return self._regions[operation.index]

    def is_within_range(self, operation: Operation) -> bool:
        """Whether the operation is of the modules out of which no parts go."""
        return any(first <= operation.index < last for first, last in self._ranges)

    def treats_tokens_alike(self, operation: Operation) -> bool:
        """Whether the operator's rule lets it work on parts of the sequence."""
        if self.axes.registry.find(operation.function) is None:
            return False
        marks = self.axes.marks
        return not any(
            atom.index in self._atoms
            for mark in (marks.contracted, marks.looked_up, marks.iota, marks.classes, marks.blocked)
            for atom in self.axes.marked(mark, operation)
        )

    def draws(self, operation: Operation) -> bool:
        """Whether the operator draws random numbers."""
        rule = self.axes.registry.find(operation.function)
        return rule is not None and rule.random

    def _works_on_parts(self, operation: Operation) -> bool:
        states = self.states
        return (
            any(states.is_local(value) or states.made_local(value) for value in operation.inputs)
            or any(states.made_local(value) for value in operation.outputs)
            or any(self.is_partial(value, operation) for value in (*operation.inputs, *operation.outputs))
        )

    def _find_sources(self, tables: Set[str]) -> list[list[Value]]:
        found: dict[tuple[object, ...], list[Value]] = defaultdict(list)
        for one in self._reductions.all:
            found[Where(one.module, one.path, True, one.call).key].append(one.value)
        for operation in self.trace.operations:
            module = operation.module
            if module is None or module.path not in tables or not self.states.is_local(operation.inputs[0]):
                continue
            if self.states.selection.looks_up(operation):
                found["lookup", module.path].append(operation.outputs[0])
        return list(found.values())

    def _find_ranges(self) -> list[tuple[int, int]]:
        """The operations among which parts stay: those of the innermost modules in which all come to be.

        What code around them does with their outputs, on paths that no example showed too, is done with
        wholes: a generation takes the last token of what all layers give.
        """
        around: dict[int, ModuleCall | None] = {}
        begun: dict[int, Operation] = {}
        for values in self.sources:
            for value in values:
                producer = value.producer
                if self.dimension(value) is None or producer is None:
                    continue
                root = next(root for _, root in self.trace.runs if root.first <= producer.index < root.last)
                begun.setdefault(root.index, producer)
                module = around.get(root.index, producer.module)
                while module is not None and not module.first <= producer.index < module.last:
                    module = module.parent
                around[root.index] = module
        found = []
        for root_index, module in around.items():
            leaf = begun[root_index].module
            # a module that gives but one such value does nothing with it itself
            if module is not None and module is leaf and module.parent is not None:
                module = module.parent
            if module is not None:
                found.append((module.first, module.last))
        return found
