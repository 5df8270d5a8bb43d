"""The chosen axes together: which values they cut, how, and what operations do with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from colrow.axes import Axes, dimension_layout
from colrow.axes.cutting import held_indices
from colrow.axes.factor import Factor, Reason
from colrow.layout import Cut, DimensionLayout
from colrow.plan.candidates import Candidate
from colrow.plan.plan import Sharding
from colrow.trace.records import Operation, Value


class CannotPlaceError(Exception):
    """Chosen axes cannot be cut after all.

    Attributes:
        candidates: those that have to stay whole.
        reason: why.
    """

    def __init__(self, candidates: Iterable[Candidate], reason: Reason) -> None:
        super().__init__(str(reason))
        self.candidates = tuple(candidates)
        self.reason = reason


class UnreachableError(CannotPlaceError):
    """Something would have to be done to values where nothing can be done to them.

    Attributes:
        values: their indices in the trace.
        key: of the result at which it was tried, if it was at one.
    """

    def __init__(
        self, cause: CannotPlaceError, values: Iterable[int], key: tuple[object, ...] | None = None
    ) -> None:
        super().__init__(cause.candidates, cause.reason)
        self.values, self.key = frozenset(values), key


@dataclass(frozen=True, eq=False)
class Chosen:
    """A candidate that is cut.

    Attributes:
        name: of the plan's axis; alike candidates of repeated layers have one.
        candidate: what is cut.
        cut: how.
    """

    name: str
    candidate: Candidate
    cut: Cut

    def held(self, rank: int) -> dict[int, tuple[int, int]]:
        """First and last (exclusive) unit of each of its atoms that ``rank`` holds, by the atom's index."""
        start, stop = self.cut.start(rank), self.cut.stop(rank)
        atom = self.candidate.axis.atom
        if self.candidate.within is None:
            return {atom.index: (start, stop)}
        size = atom.size
        low, high = start // size, -(-stop // size)
        inner = (start - low * size, stop - low * size) if high - low == 1 else (0, size)
        return {self.candidate.within.atom.index: (low, high), atom.index: inner}


class Selection:
    """What is cut in a trace."""

    def __init__(self, axes: Axes, chosen: Sequence[Chosen]) -> None:
        self.axes, self.chosen = axes, tuple(chosen)
        self.trace = axes.trace
        self._by_atom = {atom.index: one for one in chosen for atom in one.candidate.atoms}
        self._cut: dict[int, Chosen | None] = {}

    @property
    def ranks(self) -> int:
        """Size of the tensor-parallel group."""
        return self.chosen[0].cut.ranks if self.chosen else 1

    def chosen_of(self, value: Value) -> Chosen | None:
        """What cuts a value, if anything does."""
        if value.index not in self._cut:
            found = (self._by_atom.get(atom.index) for atom in self.axes.atoms(value))
            self._cut[value.index] = next((one for one in found if one is not None), None)
        return self._cut[value.index]

    def is_cut(self, value: Value) -> bool:
        """Whether a chosen axis runs through the value."""
        return self.chosen_of(value) is not None

    def contracts(self, operation: Operation) -> bool:
        """Whether the operation sums over a chosen axis."""
        return self._any(self.axes.marked(self.axes.marks.contracted, operation))

    def looks_up(self, operation: Operation) -> bool:
        """Whether the operation looks up along a chosen axis."""
        return self._any(self.axes.marked(self.axes.marks.looked_up, operation))

    def counts(self, operation: Operation) -> bool:
        """Whether the content of the result depends on the position along a chosen axis."""
        return self._any(self.axes.marked(self.axes.marks.iota, operation))

    def classifies(self, operation: Operation) -> bool:
        """Whether a chosen axis is the classes of the operation's loss."""
        return self._any(self.axes.marked(self.axes.marks.classes, operation))

    def _any(self, atoms: tuple[Factor, ...]) -> bool:
        return any(atom.index in self._by_atom for atom in atoms)

    def dimensions(self, value: Value) -> list[int]:
        """The dimensions that a chosen axis runs through."""
        return [
            dimension
            for dimension, factor in enumerate(self.axes.dimensions(value))
            if factor.size > 1 and self._any(self.axes.atoms_of(factor))
        ]

    def sharding(self, value: Value) -> Sharding:
        """How the value is cut.

        Raises:
            CannotPlaceError: if it is cut along more than one dimension, or not as a layout can say.
        """
        chosen = self.chosen_of(value)
        assert chosen is not None
        dimensions = self.dimensions(value)
        if len(dimensions) != 1:
            raise self.cannot(f"a tensor of shape {list(value.shape)} would be cut twice", value)
        (dimension,) = dimensions
        return Sharding(chosen.name, dimension, self.layout(value, dimension))

    def layout(self, value: Value, dimension: int) -> DimensionLayout:
        """How the units of what cuts the value lie in one of its dimensions."""
        chosen = self.chosen_of(value)
        assert chosen is not None
        candidate = chosen.candidate
        within = None if candidate.within is None else candidate.within.atom
        factor = self.axes.dimensions(value)[dimension]
        try:
            return dimension_layout(self.axes.factors, factor, candidate.axis.atom, within)
        except ValueError as error:
            raise self.cannot(str(error), value) from error

    def local_shape(self, value: Value, rank: int) -> tuple[int, ...]:
        """The shape of a rank's part of a value."""
        held: dict[int, tuple[int, int]] = {}
        for one in self.chosen:
            held.update(one.held(rank))
        sizes = []
        for factor in self.axes.dimensions(value):
            kept = None if factor.size <= 1 else held_indices(self.axes.factors, factor, held)
            sizes.append(factor.size if kept is None else len(kept))
        return tuple(sizes)

    def cannot(self, text: str, *subjects: Value | Operation | None) -> CannotPlaceError:
        """The error that says so and blames the axes of ``subjects``, or of what surrounds them."""
        operations = [one for one in subjects if isinstance(one, Operation)]
        blamed = self._blamed(one for one in subjects if one is not None)
        if not blamed:
            for operation in operations:
                blamed = blamed or self._surrounding(operation)
        if not blamed:
            blamed = list(self.chosen)
        reason = Reason(text, operations[0] if operations else None)
        return CannotPlaceError([one.candidate for one in blamed], reason)

    def _blamed(self, subjects: Iterable[Value | Operation]) -> list[Chosen]:
        found: dict[int, Chosen] = {}
        for subject in subjects:
            values = [subject] if isinstance(subject, Value) else [*subject.inputs, *subject.outputs]
            for value in values:
                chosen = self.chosen_of(value)
                if chosen is not None:
                    found[id(chosen)] = chosen
        return list(found.values())

    def _surrounding(self, operation: Operation) -> list[Chosen]:
        """The axes of the innermost module around an operation that has any."""
        module = operation.module
        while module is not None:
            found = self._blamed(self.trace.operations[module.first : module.last])
            if found:
                return found
            module = module.parent
        return []
