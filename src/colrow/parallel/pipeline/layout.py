"""Which calls of units, which values and which parameters each stage of a pipeline has."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from colrow.parallel.pipeline.flow import Flow
from colrow.parallel.pipeline.live import Place
from colrow.parallel.pipeline.record import Recording, alone
from colrow.trace.records import Value
from colrow.trace.tree import Path


@dataclass(frozen=True)
class Stage:
    """A contiguous run of a model's calls of units.

    Attributes:
        index: position in the order of computation.
        first, last: its calls of units are ``calls[first:last]``.
        receives, sends: the values that cross into it and out of it.
        parameters: first names of those that it reads.
        places: by index of those values that are made outside of units, where that is.
        outputs, lacking: of the last stage: paths in the model's result of what it can and cannot compute.
    """

    index: int
    first: int
    last: int
    receives: tuple[Value, ...]
    sends: tuple[Value, ...]
    parameters: frozenset[str]
    places: Mapping[int, Place] = field(default_factory=dict)
    outputs: frozenset[Path] = frozenset()
    lacking: frozenset[Path] = frozenset()


@dataclass(frozen=True)
class StageLayout:
    """All stages of a pipeline.

    Attributes:
        stages: in the order of computation.
        rank_of: by stage, the rank along ``pp`` that computes it.
        holders: by first name of a parameter, the ranks along ``pp`` that hold it, in rising order.
    """

    stages: tuple[Stage, ...]
    rank_of: tuple[int, ...]
    holders: Mapping[str, tuple[int, ...]]

    def of_rank(self, rank: int) -> list[Stage]:
        """The stages of a rank along ``pp``."""
        return [stage for stage in self.stages if self.rank_of[stage.index] == rank]


def lay_out(
    recording: Recording, flow: Flow, boundaries: Sequence[int], rank_of: Sequence[int], names: Sequence[str]
) -> StageLayout:
    """Stages between ``boundaries``.

    Args:
        recording, flow: of the model.
        boundaries: calls of units that all stages but the first begin with.
        rank_of: by stage, the rank along ``pp``.
        names: first names of all parameters.
    """
    count = len(recording.calls)
    ends = [0, *boundaries, count]
    readers: dict[str, set[int]] = {name: set() for name in names}
    for call in recording.calls:
        for name in recording.parameters[call.path]:
            readers[name].add(call.index)
    for name, calls in flow.inside.items():
        readers[name] |= calls
    stages = []
    for index, (first, last) in enumerate(itertools.pairwise(ends)):
        received = {value.index for value in flow.crossing.get(first, ())}
        outside = _read_outside(recording, flow, first, last, received)
        parameters = {
            # what nothing reads is held where the computation begins
            name
            for name, calls in readers.items()
            if any(first <= call < last for call in calls)
            or name in outside
            or (not calls and name not in flow.outside and index == 0)
        }
        outputs = frozenset(
            path
            for path, value in flow.outputs.items()
            if last == count and all(flow.makers[one] >= first for one in flow.walk([value], received)[1])
        )
        stages.append(
            Stage(
                index,
                first,
                last,
                tuple(map(alone, flow.crossing.get(first, ()))),
                tuple(map(alone, flow.crossing.get(last, ()))),
                frozenset(parameters),
                {
                    value.index: flow.places[value.index]
                    for value in (*flow.crossing.get(first, ()), *flow.crossing.get(last, ()))
                    if value.index in flow.places
                },
                outputs,
                frozenset(flow.outputs) - outputs,
            )
        )
    holders = {
        name: tuple(sorted({rank_of[stage.index] for stage in stages if name in stage.parameters}))
        for name in names
    }
    return StageLayout(tuple(stages), tuple(rank_of), holders)


def _read_outside(
    recording: Recording, flow: Flow, first: int, last: int, received: Collection[int]
) -> set[str]:
    """The parameters that a stage reads outside of units: for what its units read, and for what it sends."""
    wanted = [value for value in flow.crossing.get(last, ()) if value.index in flow.places]
    if last == len(recording.calls) and flow.needed is not None:
        wanted.append(flow.needed)
    for call in recording.calls[first:last]:
        for operation in recording.trace.operations[call.record.first : call.record.last]:
            wanted += [value for value in operation.inputs if value.source.kind != "parameter"]
    return flow.walk(wanted, received)[0]
