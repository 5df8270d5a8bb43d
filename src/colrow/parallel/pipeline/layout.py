"""Which calls of units, which values and which parameters each stage of a pipeline has."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from colrow.parallel.pipeline.flow import Flow
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
        outputs, lacking: of the last stage: paths in the model's result of what it can and cannot compute.
    """

    index: int
    first: int
    last: int
    receives: tuple[Value, ...]
    sends: tuple[Value, ...]
    parameters: frozenset[str]
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
    for found in (flow.inside, flow.outside):
        for name, calls in found.items():
            readers[name] |= {min(call, count - 1) for call in calls}
    stages = []
    for index, (first, last) in enumerate(itertools.pairwise(ends)):
        parameters = {
            # what nothing reads is held where the computation begins
            name
            for name, calls in readers.items()
            if any(first <= call < last for call in calls) or (not calls and index == 0)
        }
        received = {value.index for value in flow.crossing.get(first, ())}
        outputs = frozenset(
            path
            for path, origins in flow.outputs.items()
            if last == count and all(flow.makers[one] >= first or one in received for one in origins)
        )
        stages.append(
            Stage(
                index,
                first,
                last,
                tuple(map(alone, flow.crossing.get(first, ()))),
                tuple(map(alone, flow.crossing.get(last, ()))),
                frozenset(parameters),
                outputs,
                frozenset(flow.outputs) - outputs,
            )
        )
    holders = {
        name: tuple(sorted({rank_of[stage.index] for stage in stages if name in stage.parameters}))
        for name in names
    }
    return StageLayout(tuple(stages), tuple(rank_of), holders)
