"""From sequences that are cut to the actions of a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from colrow.plan.gradients import Summation
from colrow.plan.plan import Along, Entry, PartialParameter, SequenceGather, SequenceSlice
from colrow.plan.sequence.cut import Crossing, SequenceCut
from colrow.plan.sites import Sites, Where, merged
from colrow.trace.records import Operation, Value

if TYPE_CHECKING:
    from colrow.plan.lower import Actions


def along_of(value: Value, sequences: Iterable[SequenceCut]) -> Along | None:
    """The dimension along which a value is cut between regions; ``None`` if it is not."""
    for sequence in sequences:
        if value.index in sequence.scattered:
            return Along(sequence.name, sequence.scattered[value.index])
        if value.index in sequence.cut:
            return Along(sequence.name, sequence.dimension(value) or 0)
    return None


def but_gathered(summations: Iterable[Summation], sequences: Iterable[SequenceCut]) -> list[Summation]:
    """The summations that a gather does not do with its reduce-scatter."""
    gathered = {
        crossing.value.index
        for sequence in sequences
        for crossing in sequence.crossings
        if crossing.way == "partial"
    }
    gathered.update(index for sequence in sequences for index in sequence.absorbed)
    return [one for one in summations if one.value.index not in gathered]


def lower_sequences(sequences: Sequence[SequenceCut], sites: Sites, actions: Actions) -> None:
    """Add what happens to values along sequences.

    Raises:
        CannotPlaceError: if something would have to happen where nothing can be done.
    """
    for sequence in sequences:
        for gradient in ("partial", "whole"):
            crossings = [one for one in sequence.crossings if one.way == gradient]
            actions.sequence_gathers += _gathers(sequence, crossings, gradient, sites)
        actions.sequence_slices += _slices(sequence, sites)
        actions.sequence_gathers += _returned(sequence, sites)
        for parameter, operations in sequence.partial:
            for action in _partial(parameter, operations):
                if action not in actions.partial_parameters:
                    actions.partial_parameters.append(action)
        actions.entries += _entered(sequence, sites)


def _gathers(
    sequence: SequenceCut, crossings: list[Crossing], gradient: Literal["partial", "whole"], sites: Sites
) -> Iterable[SequenceGather]:
    """Places that share a value share its gather."""
    found: dict[tuple[object, ...], list[Where]] = defaultdict(list)
    dimensions: dict[tuple[object, ...], int] = {}
    again: dict[tuple[object, ...], tuple[str, ...]] = {}
    for crossing in crossings:
        for where in crossing.places:
            found[where.key].append(where)
            dimensions[where.key] = crossing.dimension
            again[where.key] = sequence.again.get(crossing.value.index, ())
    for keys in merged([{where.key for where in crossing.places} for crossing in crossings]):
        ordered = [key for key in found if key in keys]
        places = tuple(place for key in ordered for place in sites.places(found[key]))
        layers = tuple(dict.fromkeys(path for key in ordered for path in again[key]))
        yield SequenceGather(places, Along(sequence.name, dimensions[ordered[0]]), gradient, layers)


def _slices(sequence: SequenceCut, sites: Sites) -> Iterable[SequenceSlice]:
    found: dict[tuple[object, ...], list[tuple[Where, int]]] = defaultdict(list)
    for crossing in sequence.crossings:
        if crossing.way == "slice":
            for where in crossing.places:
                found[where.key].append((where, crossing.dimension))
    for group in found.values():
        for place in sites.places([where for where, _ in group]):
            yield SequenceSlice(place, Along(sequence.name, group[0][1]))


def _returned(sequence: SequenceCut, sites: Sites) -> Iterable[SequenceGather]:
    found: dict[tuple[object, ...], list[tuple[Where, int]]] = defaultdict(list)
    for _, where, _, dimension in sequence.returned:
        found[where.key].append((where, dimension))
    for group in found.values():
        places = sites.places([where for where, _ in group])
        yield SequenceGather(tuple(places), Along(sequence.name, group[0][1]), "whole")


def _partial(parameter: Value, operations: Iterable[Operation]) -> Iterable[PartialParameter]:
    readers = {operation.module.path: None for operation in operations if operation.module is not None}
    for reader in readers:
        yield PartialParameter(parameter.source.name, reader)


def _entered(sequence: SequenceCut, sites: Sites) -> Iterable[Entry]:
    """Values that are no parameters and meet parts: their gradients are partial there."""
    found: dict[tuple[object, ...], list[Where]] = defaultdict(list)
    together = []
    for value, operations in sequence.entered:
        everywhere = all(use in operations for use in value.uses)
        acting = sites.readers(value, operations, everywhere)
        for where in acting:
            found[where.key].append(where)
        together.append({where.key for where in acting})
    for keys in merged(together):
        ordered = [key for key in found if key in keys]
        yield Entry(tuple(place for key in ordered for place in sites.places(found[key])))
