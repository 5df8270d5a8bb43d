"""Choosing where stages begin: equal costs first, then few bytes between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from colrow.errors import PlanError
from colrow.parallel.pipeline.flow import Flow
from colrow.parallel.pipeline.live import bytes_of
from colrow.parallel.pipeline.record import Recording
from colrow.trace.records import Operation, Value

_SLACK = 1.05
"""Stages may cost so much more than the most even ones, where that saves bytes between them."""


def estimated_costs(recording: Recording) -> list[float]:
    """Floating-point operations of each call of a unit, forward, with the example's sizes.

    What multiplies no matrices counts as one operation for each element that it makes.
    """
    costs = []
    for call in recording.calls:
        operations = recording.trace.operations[call.record.first : call.record.last]
        costs.append(float(sum(_cost(operation) for operation in operations)))
    return costs


def _cost(operation: Operation) -> int:
    count = flop_registry.get(operation.function._overloadpacket)
    if count is not None:
        results = [_on_meta(value) for value in operation.outputs]
        keywords = {name: _on_meta(item) for name, item in operation.keywords.items()}
        result = results[0] if len(results) == 1 else tuple(results)
        return int(count(*map(_on_meta, operation.arguments), **keywords, out_val=result))
    return sum(math.prod(value.shape) for value in operation.outputs if value.producer is operation)


def _on_meta(item: Any) -> Any:
    if isinstance(item, Value):
        return torch.empty(item.shape, dtype=item.dtype, device="meta")
    if isinstance(item, tuple | list):
        return type(item)(_on_meta(each) for each in item)
    return item


def crossing_bytes(flow: Flow, boundary: int) -> int:
    """Bytes that cross a boundary forward, with the example's sizes."""
    return bytes_of(flow.crossing[boundary])


def named_boundaries(recording: Recording, flow: Flow, names: Sequence[str], stages: int) -> list[int]:
    """The boundaries before the first calls of named units.

    Raises:
        PlanError: if there is no such unit, they are not in the order of calls, or a boundary is not legal.
    """
    if len(names) != stages - 1:
        raise PlanError(
            "",
            f"{stages} stages need {stages - 1} names of units, not {len(names)}",
            "Name where each begins.",
        )
    found: list[int] = []
    paths = [call.path for call in recording.calls]
    for name in names:
        if name not in paths:
            known = ", ".join(dict.fromkeys(paths))
            raise PlanError(name, "no unit is called so", f"Stages can begin with: {known}.")
        found.append(paths.index(name))
        if found[-1] in flow.illegal:
            raise PlanError(name, f"no stage can begin here: {flow.illegal[found[-1]]}", "Name another.")
    if found != sorted(set(found)) or 0 in found:
        raise PlanError("", f"{list(names)} do not follow each other", "Name units in the order of calls.")
    return found


def chosen_boundaries(
    recording: Recording, flow: Flow, stages: int, costs: Mapping[str, float] | None = None
) -> list[int]:
    """Boundaries of stages whose largest cost is small, and between which few bytes are sent.

    Args:
        recording, flow: of the model.
        stages: how many.
        costs: measured seconds, or anything, of one call of each unit by path; default: estimated operations.

    Raises:
        PlanError: if the model cannot be cut so often.
    """
    own = estimated_costs(recording)
    if costs is not None:
        unknown = [call.path for call in recording.calls if call.path not in costs]
        if unknown:
            raise PlanError(unknown[0], "it has no cost", "Give costs of all units, or of none.")
        own = [float(costs[call.path]) for call in recording.calls]
    legal = [boundary for boundary in range(1, len(own)) if boundary not in flow.illegal]
    if len(legal) < stages - 1:
        reasons = list(dict.fromkeys(flow.illegal.values()))
        raise PlanError(
            "",
            f"{stages} stages need {stages - 1} places to cut the model at, and it has {len(legal)}"
            + "".join(f"; {reason}" for reason in reasons[:3]),
            "Use fewer stages.",
        )
    sums = [0.0, *itertools.accumulate(own)]
    ends = [0, *legal, len(own)]
    bottleneck = _best(ends, sums, stages, lambda _: 0.0, math.inf)[0]
    sent = {end: float(crossing_bytes(flow, end)) if 0 < end < len(own) else 0.0 for end in ends}
    limit = bottleneck * _SLACK
    return _best(ends, sums, stages, lambda end: sent[end], limit)[1]


def _best(
    ends: list[int], sums: list[float], stages: int, weight: Any, limit: float
) -> tuple[float, list[int]]:
    """With ``limit`` infinite the cuts of least largest cost, else those of least weight within the limit."""
    bounded = math.isfinite(limit)
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(stages):
        following: dict[int, tuple[float, list[int]]] = {}
        for begin, (value, cuts) in best.items():
            for end in ends:
                if end <= begin:
                    continue
                cost = sums[end] - sums[begin]
                if bounded and cost > limit:
                    break
                new = value + weight(end) if bounded else max(value, cost)
                if end not in following or new < following[end][0]:
                    following[end] = (new, [*cuts, end])
        best = following
    value, cuts = best[ends[-1]]
    return value, cuts[:-1]
