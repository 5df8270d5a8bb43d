"""What is known of a sequence that is cut between regions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from colrow.axes import Axes, Axis
from colrow.axes.factor import Factor, find
from colrow.plan.candidates import Candidate
from colrow.plan.selection import Chosen, Selection
from colrow.plan.sites import Where
from colrow.plan.states import States
from colrow.trace.records import ModuleCall, Operation, Value

Way = Literal["slice", "partial", "whole"]
"""How a value goes from one layout to the other: a rank takes its part; the parts are gathered for readers
whose gradients are partial sums; or for readers whose gradients are the same on all ranks."""


@dataclass(frozen=True, eq=False)
class Crossing:
    """A value that some operations read in another layout than it has.

    Attributes:
        value: the value.
        operations: those that read it so.
        way: which way it goes.
        dimension: of the value, along which it is cut.
        places: where it is done.
    """

    value: Value
    operations: tuple[Operation, ...]
    way: Way
    dimension: int
    places: tuple[Where, ...]

    def read_after(self, where: Where) -> list[Operation]:
        """Those of the operations that read what ``where``, one of the places, gives."""
        if where.is_result:
            return list(self.operations)
        passed = where.module if where.call is None else where.call
        return [one for one in self.operations if passed.first <= one.index < passed.last]


@dataclass(eq=False)
class SequenceCut:
    """One sequence that is cut between the regions of a selection.

    Attributes:
        name: as the plan calls it.
        selection: of the sequence's axes alone, one for each run of the trace, cut evenly.
        cut: indices of the values of which each rank has a part.
        scattered: dimension of each partial sum that becomes parts, by the value's index.
        crossings: where values are sliced and gathered.
        again: paths of the linear layers that read a gathered value and keep the part, by the value's index.
        absorbed: values that enter regions and need no sum of gradients, as the gather before them does it.
        returned: outputs of the model that are gathered.
        partial: parameters that meet parts, with the operations that read them: their gradients are summed.
        entered: other values that do, likewise.
    """

    name: str
    selection: Selection
    cut: set[int] = field(default_factory=set)
    scattered: dict[int, int] = field(default_factory=dict)
    crossings: list[Crossing] = field(default_factory=list)
    again: dict[int, tuple[str, ...]] = field(default_factory=dict)
    absorbed: set[int] = field(default_factory=set)
    returned: list[tuple[ModuleCall, Where, Value, int]] = field(default_factory=list)
    partial: list[tuple[Value, tuple[Operation, ...]]] = field(default_factory=list)
    entered: list[tuple[Value, tuple[Operation, ...]]] = field(default_factory=list)

    def dimension(self, value: Value) -> int | None:
        """The one dimension of ``value`` that is the sequence and nothing else; ``None`` if there is none."""
        return dimension_of(self.selection, value)

    def gathered(self, value: Value) -> Crossing | None:
        """How the parts of ``value`` are gathered where it enters a region, if they are."""
        return next((one for one in self.crossings if one.value is value and one.way == "partial"), None)


class SequenceCandidate(Candidate):
    """A sequence, of which ranks get consecutive tokens, whatever it is put together from.

    A loss that compares each token with the next makes of a sequence of 10 a sum, ``(9 + 1)``.

    Args:
        parts: the atoms, one after the other.
        name: of the sequence.
    """

    def __init__(self, parts: tuple[Factor, ...], name: str) -> None:
        super().__init__(Axis(parts[0].index, parts[0], parts[0].size), None, name)
        self.parts = parts

    @property
    def units(self) -> int:
        """Tokens."""
        return sum(part.size for part in self.parts)

    @property
    def atoms(self) -> tuple[Factor, ...]:
        """What is cut."""
        return self.parts


@dataclass(frozen=True, eq=False)
class ChosenSequence(Chosen):
    """A sequence that is cut."""

    def held(self, rank: int) -> dict[int, tuple[int, int]]:
        """First and last (exclusive) index of each of its atoms that ``rank`` holds, by the atom's index."""
        start, stop = self.cut.start(rank), self.cut.stop(rank)
        found, begin = {}, 0
        for part in self.candidate.atoms:
            low, high = (min(max(bound - begin, 0), part.size) for bound in (start, stop))
            found[part.index] = (low, high)
            begin += part.size
        return found


def dimension_of(selection: Selection, value: Value) -> int | None:
    """The one dimension of ``value`` that is a chosen sequence and nothing else; ``None`` if none is."""
    axes = selection.axes
    sequences = [one.candidate.atoms for one in selection.chosen]
    known = {atom.index for atoms in sequences for atom in atoms}
    found = [
        (dimension, factor)
        for dimension, factor in enumerate(axes.dimensions(value))
        if factor.size > 1 and any(atom.index in known for atom in axes.atoms_of(factor))
    ]
    if len(found) != 1:
        return None
    dimension, factor = found[0]
    return dimension if parts_of(axes, factor) in sequences else None


def parts_of(axes: Axes, factor: Factor) -> tuple[Factor, ...] | None:
    """The atoms of which ``factor`` is one, or a sum; ``None`` if it is put together otherwise."""
    parts = tuple(find(part) for part in axes.factors.parts(factor, "sum"))
    is_sum = all(part.kind == "atom" for part in parts) and len(set(parts)) == len(parts)
    return parts if is_sum else None


class PartStates(States):
    """The state of values under a sequence that is cut, for those who ask which values are parts.

    A value may be a part in the code of one module and whole in that of another, which gathers it. Sizes are
    those of what ``within`` sees.
    """

    def __init__(self, selection: Selection, cut: Collection[int], crossings: Collection[Crossing]) -> None:
        self.selection, self.borders = selection, set()
        self.within: ModuleCall | None = None
        self.slices = {one.value.index: list(one.operations) for one in crossings if one.way == "slice"}
        self._local = set(cut)
        self._crossings: dict[int, list[Crossing]] = {}
        for one in crossings:
            self._crossings.setdefault(one.value.index, []).append(one)

    def is_local(self, value: Value) -> bool:
        """Whether ``within`` sees a part of the value."""
        is_part = value.index in self._local
        for one in self._crossings.get(value.index, ()):
            if any(self._sees(where, value) for where in one.places):
                is_part = one.way == "slice"
        return is_part

    def _sees(self, where: Where, value: Value) -> bool:
        """Whether ``within`` gets the value as it is after ``where``."""
        if self.within is None:
            return False
        if where.is_result:
            made = value.producer
            return made is None or not where.module.first <= self.within.first <= made.index
        if where.call is not None:
            return False
        module: ModuleCall | None = self.within
        while module is not None and module is not where.module:
            module = module.parent
        return module is not None
