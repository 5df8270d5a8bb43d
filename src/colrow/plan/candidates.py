"""What could be cut: every axis with the memory it would save and what it would communicate.

Besides single axes there are *pairs*: where an axis has fewer units than there are ranks, such as three
key-value heads for four ranks, each of its units may be cut further along an axis that lies within it, such
as the queries of a head. What lies on the outer axis alone is then held by all ranks that share its unit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from math import prod

from colrow.axes import Axes, Axis, Reason
from colrow.axes.factor import Factor
from colrow.axes.legality import Volumes
from colrow.trace.records import Operation, Value

#: Operators that need rows of a multiple of 16 bytes, and how many elements that is at most.
_ALIGNED, ALIGNMENT = ("aten._grouped_mm",), 8


@dataclass(eq=False)
class Candidate:
    """One axis, or a pair of axes, that could be cut.

    Attributes:
        axis: whose atom is cut.
        within: the axis of which each unit is cut further along ``axis``; ``None`` for a single axis.
        signature: its parameters with numbers of layers left out: the same in all repeated layers.
        saved: elements of parameters that a rank does not hold if this is cut.
        traffic: elements communicated in a forward and backward pass, at real batch sizes.
        operations: indices of the operations that have tensors with it.
        alignment: units that should stay together, where an operator asks for aligned memory.
        is_given: whether it runs through an input of the model, which ranks would have to slice.
        illegal: why it cannot be cut over this many ranks.
    """

    axis: Axis
    within: Axis | None
    signature: str
    saved: float = 0.0
    traffic: int = 0
    operations: frozenset[int] = frozenset()
    alignment: int = 1
    is_given: bool = False
    illegal: list[Reason] = field(default_factory=list)

    @property
    def units(self) -> int:
        """Units that ranks can hold."""
        return self.axis.size * (self.within.size if self.within is not None else 1)

    @property
    def outer(self) -> Axis:
        """The axis that all its parameters lie on."""
        return self.axis if self.within is None else self.within

    @property
    def atoms(self) -> tuple[Factor, ...]:
        """What is cut."""
        return (self.axis.atom,) if self.within is None else (self.within.atom, self.axis.atom)

    def __repr__(self) -> str:
        inside = f" within {self.within.size}" if self.within is not None else ""
        return f"Candidate({self.axis.size}{inside}: {self.signature})"


def find_candidates(axes: Axes, ranks: int) -> list[Candidate]:
    """Every axis that has parameters, and every pair that is needed, in a fixed order."""
    return _Search(axes, ranks).run()


class _Search:
    def __init__(self, axes: Axes, ranks: int) -> None:
        self._axes, self._ranks = axes, ranks
        self._volumes = Volumes(axes)
        self._operations: dict[int, set[int]] = defaultdict(set)
        self._traffic: dict[int, int] = defaultdict(int)
        self._volume_of: dict[int, int] = {}

    def run(self) -> list[Candidate]:
        self._walk()
        found = []
        for axis in self._axes.all:
            if axis.parameters:
                found.append(self._single(axis))
        for candidate in list(found):
            if candidate.axis.legal and candidate.axis.size < self._ranks:
                found += self._pairs(candidate.axis)
        return found

    def _volume(self, value: Value) -> int:
        known = self._volume_of.get(value.index)
        if known is None:
            known = self._volume_of[value.index] = self._volumes.of(value)
        return known

    def _walk(self) -> None:
        """Which operations each axis appears in, and its traffic."""
        axes = self._axes
        entered: dict[int, set[int]] = defaultdict(set)
        atoms: dict[int, frozenset[int]] = {}

        def atoms_of(value: Value) -> frozenset[int]:
            known = atoms.get(value.index)
            if known is None:
                known = atoms[value.index] = frozenset(atom.index for atom in axes.atoms(value))
            return known

        for operation in axes.trace.operations:
            results = frozenset[int]().union(*map(atoms_of, operation.outputs))
            for index in results.union(*map(atoms_of, operation.inputs)):
                self._operations[index].add(operation.index)
            for mark in (axes.marks.contracted, axes.marks.looked_up):
                for atom in axes.marked(mark, operation):
                    self._traffic[atom.index] += 2 * sum(map(self._volume, operation.outputs[:1]))
            for value in operation.inputs:
                if not value.differentiable:
                    continue
                for index in results - atoms_of(value):
                    if value.storage not in entered[index]:
                        entered[index].add(value.storage)
                        self._traffic[index] += 2 * self._volume(value)
        for _, value in axes.trace.outputs:
            for index in atoms_of(value):
                self._traffic[index] += self._volume(value)

    def _single(self, axis: Axis) -> Candidate:
        candidate = Candidate(axis, None, _signature(axis), illegal=list(axis.illegal))
        candidate.saved = self._saved(axis, {axis.index: -(-axis.size // self._ranks) / axis.size})
        candidate.operations = frozenset(self._operations[axis.index])
        trace = self._axes.trace
        if any(trace.operations[index].name in _ALIGNED for index in candidate.operations):
            candidate.alignment = ALIGNMENT
        candidate.is_given = any(value.source.kind == "input" for value, _ in axis.members)
        candidate.traffic = self._traffic[axis.index]
        if axis.legal and axis.size < self._ranks:
            candidate.illegal.append(
                Reason(f"its {axis.size} units cannot give each of {self._ranks} ranks one")
            )
        return candidate

    def _saved(self, axis: Axis, kept: dict[int, float]) -> float:
        """Elements of parameters on ``axis`` that a rank does not hold if it keeps those shares of atoms."""
        saved = 0.0
        for value, dimension in axis.members:
            if value.source.kind == "parameter":
                factor = self._axes.dimensions(value)[dimension]
                saved += prod(value.shape) * (1 - _kept(self._axes, factor, kept) / factor.size)
        return saved

    # pairs

    def _pairs(self, outer: Axis) -> list[Candidate]:
        found: dict[int, Candidate] = {}
        for value, dimension in outer.members:
            if value.source.kind != "parameter":
                continue
            for inner in self._inside(value, dimension, outer):
                if inner.index not in found and inner.size * outer.size >= self._ranks:
                    found[inner.index] = self._pair(outer, inner)
        return list(found.values())

    def _inside(self, value: Value, dimension: int, outer: Axis) -> list[Axis]:
        """Legal axes that lie within each unit of ``outer`` in a dimension."""
        factors = self._axes.factors
        parts = factors.parts(self._axes.dimensions(value)[dimension], "product")
        at = next((index for index, part in enumerate(parts) if part is outer.atom), None)
        if at is None:
            return []
        below = {atom.index: atom for part in parts[at + 1 :] for atom in factors.atoms(part)}
        return [axis for axis in map(self._axes.axis, below.values()) if axis.legal]

    def _pair(self, outer: Axis, inner: Axis) -> Candidate:
        sharers = -(-self._ranks // outer.size)
        units = -(-inner.size // (self._ranks // outer.size))
        kept = {outer.index: 1 / outer.size, inner.index: units / inner.size}
        candidate = Candidate(inner, outer, _signature(outer), illegal=_pair_faults(self._axes, outer, inner))
        candidate.saved = self._saved(outer, kept)
        candidate.operations = frozenset(self._operations[outer.index] | self._operations[inner.index])
        candidate.traffic = max(self._traffic[outer.index], self._traffic[inner.index])
        if inner.size < sharers:
            candidate.illegal.append(
                Reason(f"{sharers} ranks would share a unit, which has {inner.size} parts")
            )
        return candidate


def _pair_faults(axes: Axes, outer: Axis, inner: Axis) -> list[Reason]:
    """Why units of ``outer`` cannot be shared by ranks that divide ``inner`` among them."""
    faults = []
    others = [operation for operation in inner.contractions if operation not in outer.contractions]
    others += [operation for operation in outer.contractions if operation not in inner.contractions]
    if others:
        faults.append(Reason("only one of the two axes of a pair is summed over", others[0]))
    alone = {name for name, _ in inner.parameters} - {name for name, _ in outer.parameters}
    if alone:
        faults.append(Reason(f"{min(alone)} lies on the inner axis of a pair alone"))
    special: list[Operation] = [*outer.lookups, *outer.losses, *outer.iotas]
    special += [*inner.lookups, *inner.losses, *inner.iotas]
    if special:
        faults.append(Reason("a lookup, a loss or positions along an axis of a pair", special[0]))
    return faults


def _kept(axes: Axes, factor: Factor, kept: dict[int, float]) -> float:
    """Number of indices of a dimension that remain when atoms keep a share of theirs."""
    factors = axes.factors
    if factor.size <= 1 or not any(atom.index in kept for atom in axes.atoms_of(factor)):
        return factor.size
    for kind in ("product", "sum"):
        parts = factors.parts(factor, "product" if kind == "product" else "sum")
        if len(parts) > 1:
            sizes = [_kept(axes, part, kept) for part in parts]
            return prod(sizes) if kind == "product" else sum(sizes)
    (atom,) = axes.atoms_of(factor)
    return factor.size * kept.get(atom.index, 1.0)


def _signature(axis: Axis) -> str:
    names = {f"{re.sub(r'(?<![^.])[0-9]+(?![^.])', '*', name)}[{at}]" for name, at in axis.parameters}
    return ", ".join(sorted(names))
