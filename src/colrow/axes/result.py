"""What inference found: the factors of every value, and the axes with what may be done to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from colrow.axes.context import ByOperation, Dimensions, Marks
from colrow.axes.factor import Factor, Reason, find
from colrow.axes.factors import Factors
from colrow.axes.registry import Registry
from colrow.trace.records import Operation, Trace, Value


@dataclass(eq=False)
class Axis:
    """A set of tensor dimensions, or factors of them, that the dataflow ties together.

    Attributes:
        index: of its atom; the same in every run of the same model.
        atom: the factor that would be cut.
        size: number of units.
        members: values and dimensions of which it is a factor.
        contractions, lookups, iotas, losses: operations that sum over it, look up in it, whose content
            depends on the index along it, or that take it for the classes of a loss.
        illegal: why it cannot be sharded; empty if it can.
    """

    index: int
    atom: Factor
    size: int
    members: list[tuple[Value, int]] = field(default_factory=list)
    contractions: list[Operation] = field(default_factory=list)
    lookups: list[Operation] = field(default_factory=list)
    iotas: list[Operation] = field(default_factory=list)
    losses: list[Operation] = field(default_factory=list)
    illegal: list[Reason] = field(default_factory=list)

    @property
    def legal(self) -> bool:
        return not self.illegal

    @property
    def parameters(self) -> list[tuple[str, int]]:
        """Names and dimensions of the parameters among the members."""
        return [
            (value.source.name, dimension)
            for value, dimension in self.members
            if value.source.kind == "parameter"
        ]

    def __repr__(self) -> str:
        names = [f"{name}[{dimension}]" for name, dimension in self.parameters]
        return f"Axis {self.index} of {self.size} ({', '.join(names) or 'no parameter'})"


@dataclass(eq=False)
class Axes:
    """The result of :func:`colrow.axes.infer`. Prints as a table.

    Attributes:
        trace: what was analysed.
        registry: the rules, for what they say of linearity.
        factors: the arena of all factors here.
        table: factors of each value, by its index; see :meth:`dimensions`.
        marks: what operators do with factors besides keeping them.
        unknown: operations that had no rule, by operator; all their dimensions are blocked.
    """

    trace: Trace
    registry: Registry
    factors: Factors
    table: dict[int, Dimensions]
    marks: Marks
    unknown: dict[str, list[Operation]]
    _atoms: dict[int, tuple[Factor, ...]] = field(default_factory=dict, repr=False)

    def dimensions(self, value: Value) -> Dimensions:
        """The factors of the dimensions of ``value``."""
        return self.table[value.index]

    def atoms(self, value: Value) -> tuple[Factor, ...]:
        """The different atoms of all dimensions of ``value``, but for those of size 1."""
        found: dict[int, Factor] = {}
        for factor in self.table[value.index]:
            if factor.size > 1:
                found.update((atom.index, atom) for atom in self.atoms_of(factor))
        return tuple(found.values())

    def atoms_of(self, factor: Factor) -> tuple[Factor, ...]:
        """The different atoms of ``factor``, as :meth:`Factors.atoms`; inference is over, so remembered."""
        root = find(factor)
        known = self._atoms.get(root.index)
        if known is None:
            known = self._atoms[root.index] = self.factors.atoms(root)
        return known

    def marked(self, mark: ByOperation, operation: Operation) -> tuple[Factor, ...]:
        """The atoms that ``operation`` marked so: ``axes.marked(axes.marks.contracted, operation)``."""
        found: dict[int, Factor] = {}
        for factor in mark.get(operation.index, ()):
            if factor.size > 1:
                found.update((atom.index, atom) for atom in self.atoms_of(factor))
        return tuple(found.values())

    @cached_property
    def all(self) -> list[Axis]:
        """Every axis of more than one unit, legal or not, in a fixed order."""
        from colrow.axes.legality import find_axes

        return find_axes(self)

    @cached_property
    def _by_atom(self) -> dict[int, Axis]:
        return {axis.index: axis for axis in self.all}

    def axis(self, atom: Factor) -> Axis:
        """The axis of an atom.

        Raises:
            KeyError: if no value has it.
        """
        return self._by_atom[find(atom).index]

    def __str__(self) -> str:
        from colrow.axes.table import render

        return render(self)
