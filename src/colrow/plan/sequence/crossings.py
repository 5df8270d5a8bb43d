"""Where values go from parts to the whole and back."""

from __future__ import annotations

from collections import defaultdict

from colrow.plan.selection import CannotPlaceError
from colrow.plan.sequence.cut import Crossing, SequenceCut, Way
from colrow.plan.sequence.facts import Facts
from colrow.plan.sequence.follow import Parts
from colrow.plan.sequence.noted import AgainError, Noted
from colrow.plan.sites import Where
from colrow.trace.records import Operation, Value


class Crossings:
    """Adds to ``found`` where values are sliced and gathered.

    Args:
        facts: of the sequence.
        noted: what is impossible, to which it adds.
        parts: what is cut.
        found: the cut.
    """

    def __init__(self, facts: Facts, noted: Noted, parts: Parts, found: SequenceCut) -> None:
        self._facts, self._noted, self._parts, self._found = facts, noted, parts, found

    def run(self) -> None:
        """Add them.

        Raises:
            AgainError: if something cannot be done, which is noted.
        """
        for index, operations in self._parts.reads.items():
            self._gather(self._facts.trace.values[index], operations)
        for index, operations in self._parts.slices.items():
            value = self._facts.trace.values[index]
            everywhere = all(use in operations for use in value.uses) and index not in self._facts.outputs
            self._add(value, operations, "slice", everywhere)
        self._check_places()
        self._return()
        self._take_early()

    def _gather(self, value: Value, operations: list[Operation]) -> None:
        facts = self._facts
        whole = [
            operation
            for operation in operations
            if value.index not in facts.entering
            and not facts.enters(value, operation)
            and any(result.differentiable for result in operation.outputs)
        ]
        passing = [operation for operation in whole if self._only_enters(value, operation)]
        way: Way = "partial"
        if len(passing) < len(whole) or not value.differentiable:
            way = "whole"
        else:
            self._found.absorbed.update(one.index for operation in passing for one in operation.outputs)
        others = [use for use in value.uses if use not in operations and not facts.is_partial(value, use)]
        self._add(value, operations, way, not others and value.index not in facts.outputs)

    def _only_enters(self, value: Value, operation: Operation) -> bool:
        """Whether nothing is done with the result but to enter a region, as with a slice of all tokens.

        Not if something else is read, such as the weight of a norm: its gradient would be a partial sum.
        """
        facts = self._facts
        return (
            not facts.is_in_region(operation)
            and not any(one.differentiable and one is not value for one in operation.inputs)
            and all(
                one.index in facts.entering and one.index not in facts.outputs for one in operation.outputs
            )
        )

    def _add(self, value: Value, operations: list[Operation], way: Way, everywhere: bool) -> None:
        dimension = self._found.dimension(value)
        assert dimension is not None
        try:
            places = self._facts.sites.readers(value, operations, everywhere, self._noted.impossible)
        except CannotPlaceError:
            self._noted.give_up(value, operations, way)
        self._found.crossings.append(Crossing(value, tuple(operations), way, dimension, tuple(places)))

    def _check_places(self) -> None:
        """Each place of the plan stands for all calls of its module: the same must happen in all of them."""
        groups: dict[tuple[object, ...], list[tuple[Where, Crossing]]] = defaultdict(list)
        for crossing in self._found.crossings:
            for where in crossing.places:
                groups[where.key].append((where, crossing))
        for key, group in groups.items():
            crossing = group[0][1]
            try:
                self._facts.sites.places([where for where, _ in group])
            except CannotPlaceError:
                if key in self._noted.impossible:
                    self._noted.give_up(crossing.value, crossing.operations, crossing.way)
                self._noted.impossible.add(key)
                raise AgainError from None
            for _, other in group:
                if (other.way, other.dimension) != (crossing.way, crossing.dimension):
                    self._noted.give_up(other.value, other.operations, other.way)

    def _return(self) -> None:
        """Outputs of the model become whole."""
        sliced = {one.value.index for one in self._found.crossings if one.way == "slice"}
        for _, root in self._facts.trace.runs:
            for path, value in root.outputs:
                if value.index in self._parts.cut and value.index not in sliced:
                    dimension = self._found.dimension(value)
                    assert dimension is not None
                    self._found.returned.append((root, Where(root, path, True), value, dimension))

    def _take_early(self) -> None:
        """Take parts of what is whole as early as that is of use: for all that one module does with it."""
        early = {
            one.value.index
            for one in self._found.crossings
            if one.way == "slice"
            and one.value.differentiable
            and one.value.source.kind != "parameter"
            and self._facts.sites.inputs(one.value)
        }
        if early - self._noted.taken - self._noted.left:
            self._noted.taken |= early - self._noted.left
            raise AgainError
