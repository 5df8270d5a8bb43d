"""Where the tokens of a sequence lie in the values of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from colrow.axes import Axes
from colrow.axes.factor import Factor, find
from colrow.layout import Cut
from colrow.parallel.context.plan import Extent
from colrow.plan.selection import Selection
from colrow.plan.sequence.cut import ChosenSequence, SequenceCandidate, parts_of
from colrow.trace.records import Operation, Value

Parts = tuple[Factor, ...]

TRIED_RANKS = 2
"""What treats every token by itself shows so on two parts."""


@dataclass(frozen=True, eq=False)
class TokenAxis:
    """The sequence of one run of a trace.

    Attributes:
        axes: of the trace.
        parts: the atoms of which it is made, one after the other.
        alike: the indices of other atoms that are as long.
    """

    axes: Axes
    parts: Parts
    alike: set[int] = field(default_factory=set)

    @cached_property
    def atoms(self) -> frozenset[int]:
        """The indices of its atoms of more than one token."""
        return frozenset(part.index for part in self.parts if part.size > 1)

    @property
    def length(self) -> int:
        """Tokens."""
        return sum(part.size for part in self.parts)

    def has(self, value: Value) -> bool:
        """Whether some of the sequence runs through the value."""
        return any(atom.index in self.atoms for atom in self.axes.atoms(value))

    def dimensions(self, value: Value) -> list[int]:
        """The dimensions through which it runs."""
        return [
            dimension
            for dimension, factor in enumerate(self.axes.dimensions(value))
            if factor.size > 1 and self._runs_through(factor)
        ]

    def alike_dimensions(self, value: Value) -> list[int]:
        """The dimensions that are as long without being the sequence."""
        if not self.alike:
            return []
        return [
            dimension
            for dimension, factor in enumerate(self.axes.dimensions(value))
            if factor.size > 1 and any(atom.index in self.alike for atom in self.axes.atoms_of(factor))
        ]

    def extent(self, value: Value) -> Extent | None:
        """Where the tokens lie, if all of them do, or all but the last, once and nothing but them."""
        dimensions = self.dimensions(value)
        if len(dimensions) != 1:
            return None
        factor = self.axes.dimensions(value)[dimensions[0]]
        missing = self._missing(factor)
        if missing is not None:
            return Extent(dimensions[0], 1, missing)
        factors = [find(part) for part in self.axes.factors.parts(factor, "product")]
        places = [place for place, part in enumerate(factors) if self._runs_through(part)]
        missing = self._missing(factors[places[0]]) if len(places) == 1 else None
        if missing is None:
            return None
        return Extent(dimensions[0], prod(part.size for part in factors[places[0] + 1 :]), missing)

    def _missing(self, factor: Factor) -> int | None:
        """How many of the last tokens a factor lacks; ``None`` if it is not the sequence."""
        parts = parts_of(self.axes, factor)
        if parts == self.parts:
            return 0
        without_last = len(self.parts) > 1 and self.parts[-1].size == 1 and parts == self.parts[:-1]
        return 1 if without_last else None

    def mixed_by(self, operation: Operation) -> str | None:
        """Why an operator cannot work on parts of the sequence; ``None`` if its rule lets it."""
        if self.axes.registry.find(operation.function) is None:
            return f"nothing is known of {operation.name}"
        marks = self.axes.marks
        for mark, text in (
            (marks.contracted, "sums over the sequence"),
            (marks.looked_up, "looks up in the sequence"),
            (marks.iota, "counts along the sequence"),
            (marks.classes, "takes the sequence for classes"),
            (marks.blocked, "needs the whole sequence"),
        ):
            if any(atom.index in self.atoms for atom in self.axes.marked(mark, operation)):
                return f"{operation.name} {text}"
        return None

    def _runs_through(self, factor: Factor) -> bool:
        return any(atom.index in self.atoms for atom in self.axes.atoms_of(factor))


def selection_of(axes: Axes, sequences: Sequence[TokenAxis]) -> Selection:
    """The sequences of all runs as if each were cut in two: for trials, and for names of places."""
    chosen, seen = [], set()
    for one in sequences:
        if one.atoms in seen:
            continue
        seen.add(one.atoms)
        candidate = SequenceCandidate(one.parts, "sequence")
        chosen.append(ChosenSequence("sequence", candidate, Cut.balanced(candidate.units, TRIED_RANKS)))
    return Selection(axes, chosen)
