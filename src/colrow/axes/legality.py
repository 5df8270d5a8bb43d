"""Which axes may be sharded at all, and why others may not."""

from __future__ import annotations

from math import prod

import torch

from colrow.axes.factor import Factor, Reason
from colrow.axes.result import Axes, Axis
from colrow.trace.content import reads_data
from colrow.trace.records import Operation, Value, WrittenGradient
from colrow.trace.written import judge, reason, whole_dimensions

#: Batches and sequences of a trace are tiny: volumes are compared as if they were this many times longer.
DATA_SCALE = 128

#: What the number of tokens that go to one expert counts as.
GUESSED_EXTENT = 1 << 20

#: A product this much larger than its operands is one of attention scores.
SCORES_RATIO = 1.5

_BATCHED_PRODUCTS = ("aten.bmm", "aten.baddbmm")


def find_axes(axes: Axes) -> list[Axis]:
    """All axes of a trace, with what speaks against each."""
    found: dict[int, Axis] = {}
    _collect_members(axes, found)
    for axis in found.values():
        axis.illegal += axis.atom.reasons
    volumes = Volumes(axes)
    for operation in axes.trace.operations:
        _collect_operation(axes, operation, found, volumes)
    for written in judge(axes.trace, axes.unknown):
        _collect_written(axes, written, found)
    outputs = {atom.index for _, value in axes.trace.outputs for atom in axes.atoms(value)}
    for axis in found.values():
        if not (axis.contractions or axis.losses or axis.lookups or axis.index in outputs):
            axis.illegal.append(Reason("never contracted nor in an output: nothing would be saved"))
    return [found[index] for index in sorted(found)]


def _collect_members(axes: Axes, found: dict[int, Axis]) -> None:
    for value in axes.trace.values:
        if value.index not in axes.table:
            continue
        dimensions = axes.dimensions(value)
        for dimension, factor in enumerate(dimensions):
            for atom in axes.atoms_of(factor) if factor.size > 1 else ():
                axis = found.get(atom.index)
                if axis is None:
                    axis = found[atom.index] = Axis(atom.index, atom, atom.size)
                axis.members.append((value, dimension))
        for atom in axes.atoms(value):
            if sum(axes.factors.count(factor, atom) for factor in dimensions) > 1:
                name = f" ({value.source.name})" if value.source.name else ""
                _forbid(found[atom.index], f"twice in one tensor{name}", value.producer)


def _collect_operation(axes: Axes, operation: Operation, found: dict[int, Axis], volumes: Volumes) -> None:
    marks = axes.marks
    kept = {atom.index for value in operation.outputs for atom in axes.atoms(value)}
    for atom in axes.marked(marks.iota, operation):
        found[atom.index].iotas.append(operation)
    for atom in axes.marked(marks.classes, operation):
        found[atom.index].losses.append(operation)
    for mark, name in ((marks.contracted, "contracted"), (marks.looked_up, "looked up")):
        for atom in axes.marked(mark, operation):
            axis = found[atom.index]
            (axis.contractions if mark is marks.contracted else axis.lookups).append(operation)
            if atom.index in kept:
                _forbid(axis, f"{name} and kept", operation)
            if not all(
                axes.factors.covers(factor, atom) for factor in _carriers(axes, mark, operation, atom)
            ):
                _forbid(axis, f"{name} together with parts that would stay whole", operation)
            if mark is marks.contracted and volumes.are_scores(operation):
                _forbid(axis, "its partial sums would be attention scores", operation)


def _collect_written(axes: Axes, written: WrittenGradient, found: dict[int, Axis]) -> None:
    operation = axes.trace.operations[written.first] if written.first < written.last else None
    for value, dimension in whole_dimensions(written):
        factor = axes.dimensions(value)[dimension]
        for atom in axes.atoms_of(factor) if factor.size > 1 else ():
            _forbid(found[atom.index], reason(written), operation)


def _carriers(axes: Axes, mark: dict[int, list[Factor]], operation: Operation, atom: Factor) -> list[Factor]:
    """The marked factors of ``operation`` that contain ``atom``."""
    return [factor for factor in mark[operation.index] if atom in axes.atoms_of(factor)]


def _forbid(axis: Axis, text: str, operation: Operation | None) -> None:
    if all(reason.text != text for reason in axis.illegal):
        axis.illegal.append(Reason(text, operation))


def _has_known_shape(operation: Operation) -> bool:
    """Whether the operator, of a kind that can read data, has no need to: an index of integers."""
    masks = any(value.dtype in (torch.bool, torch.uint8) for value in operation.inputs[1:])
    return operation.name in ("aten.index", "aten.index_put") and not masks


class Volumes:
    """Numbers of elements as at real batch and sequence sizes."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        parameters: set[int] = set()
        data: set[int] = set()
        for value in axes.trace.values:
            kind = value.source.kind
            if kind in ("parameter", "input"):
                target = parameters if kind == "parameter" else data
                target.update(atom.index for atom in axes.atoms(value))
        for factors in axes.marks.iota.values():
            data.update(atom.index for factor in factors for atom in axes.atoms_of(factor))
        self._guessed: set[int] = set()
        for operation in axes.trace.operations:
            if reads_data(operation.function) and not _has_known_shape(operation):
                given = {atom.index for value in operation.inputs for atom in axes.atoms(value)}
                for value in operation.outputs:
                    # how many tokens an expert gets is guessed: all together they get as many as there are
                    target = self._guessed if value.content is None else data
                    target.update(atom.index for atom in axes.atoms(value) if atom.index not in given)
        self._data = data - parameters
        self._extents: dict[int, int] = {}

    def of(self, value: Value) -> int:
        """Elements of ``value``, dimensions of the data counted :data:`DATA_SCALE` times."""
        axes = self._axes
        return prod(self._extent(factor) for factor in axes.dimensions(value))

    def _extent(self, factor: Factor) -> int:
        """The size of a dimension, its parts of the data scaled."""
        if factor.size <= 1:
            return factor.size
        known = self._extents.get(factor.index)
        if known is None:
            atoms = self._axes.atoms_of(factor)
            if not any(atom.index in self._data or atom.index in self._guessed for atom in atoms):
                known = factor.size
            else:
                factors = self._axes.factors
                parts = factors.parts(factor, "product")
                if len(parts) > 1:
                    known = prod(map(self._extent, parts))
                else:
                    parts = factors.parts(factor, "sum")
                    if len(parts) > 1:
                        known = sum(map(self._extent, parts))
                    elif atoms[0].index in self._guessed:
                        known = GUESSED_EXTENT
                    else:
                        known = factor.size * DATA_SCALE
            self._extents[factor.index] = known
        return known

    def are_scores(self, operation: Operation) -> bool:
        """Whether a batched product's result is larger than what it is made from."""
        if operation.name not in _BATCHED_PRODUCTS:
            return False
        result = sum(self.of(value) for value in operation.outputs)
        return result > SCORES_RATIO * sum(self.of(value) for value in operation.inputs)
