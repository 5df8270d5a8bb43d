"""What flows between a model's units: which values cross from the calls before a point to those after it.

Every stage of a pipeline runs the model's own forward, and in it all that lies outside of units: masks,
positions, additions between units. Only units compute on one stage each. So what a stage needs of earlier
stages is what units returned: what its own units read is followed backwards, through all operators outside of
units, to results of units, inputs, parameters and constants.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from colrow.parallel.pipeline.live import Live, Place, bytes_of, places_of
from colrow.parallel.pipeline.record import Recording
from colrow.trace.records import Operation, Value
from colrow.trace.tree import Path

Walk: TypeAlias = Callable[[Iterable[Value], Collection[int]], tuple[set[str], set[int]]]


@dataclass
class Flow:
    """What crosses each boundary; boundary ``b`` lies before call ``b`` of a unit.

    Attributes:
        crossing: by boundary, the values that cross it, in the order they came to be.
        illegal: by boundary, why there can be none there; legal ones are not in it.
        loss: path of the loss in the model's result; ``None`` if it has none.
        needed: what the last stage has to compute: the loss, or the first result.
        outputs: by path in the model's result, the values.
        places: by index of a value that is made outside of units and crosses a boundary, where it is made.
        walk: gives, for values and for indices of values at which to stop, the names of parameters and the
            indices of results of units that they are computed from.
        inside: by name of a parameter, the calls of units in which it is read.
        outside: names of parameters that are read outside of units.
        written: numbers of the memory that the model writes into.
        makers: by index of a value that a unit computed, the call.
    """

    crossing: dict[int, tuple[Value, ...]] = field(default_factory=dict)
    illegal: dict[int, str] = field(default_factory=dict)
    loss: Path | None = None
    needed: Value | None = None
    outputs: dict[Path, Value] = field(default_factory=dict)
    places: dict[int, Place] = field(default_factory=dict)
    walk: Walk = field(default=lambda values, stops: (set(), set()))
    inside: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    outside: set[str] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    makers: dict[int, int] = field(default_factory=dict)


def flow_of(recording: Recording) -> Flow:
    """Follow what the units of a recorded model read back to where it comes from."""
    return _Follower(recording).run()


class _Follower:
    def __init__(self, recording: Recording) -> None:
        self.trace, self.units = recording.trace, recording.calls
        self.starts = [call.record.first for call in self.units]
        self.flow = Flow()
        self.returned = {value.index for call in self.units for _, _, value in call.outputs}
        self.needs: dict[int, set[int]] = defaultdict(set)
        self.stops: dict[int, Value] = {}
        self.drawn: dict[int, set[int]] = defaultdict(set)
        self.writers: dict[int, list[Operation]] = defaultdict(list)
        for operation in self.trace.operations:
            for value in _written(operation):
                self.writers[value.storage].append(operation)
        self.flow.written = set(self.writers)

    def run(self) -> Flow:
        for call in self.units:
            for operation in self.trace.operations[call.record.first : call.record.last]:
                read = {value.source.name for value in operation.inputs if value.source.kind == "parameter"}
                for name in read:
                    self.flow.inside[name].add(call.index)
                self._follow(
                    [value for value in operation.inputs if value.source.name not in read], call.index
                )
        self._follow_results()
        places = places_of(self.trace, self._is_outside)
        live = Live(self.trace, self.starts, self._call_of, lambda value: bool(self.needs.get(value.index)))
        for boundary in range(1, len(self.units)):
            values = [
                value
                for index, value in sorted(self.stops.items())
                if self.flow.makers[index] < boundary <= max(self.needs[index])
            ]
            between = live.at(boundary)
            again: Collection[int] = ()  # values that later stages do not compute again
            if bytes_of(between) < bytes_of(values) and all(
                one.index in self.returned or (one.index in places and one.storage not in self.writers)
                for one in between
            ):
                values, again = between, live.computed
                self.flow.places |= {one.index: places[one.index] for one in between if one.index in places}
            self.flow.crossing[boundary] = tuple(values)
            reason = next(self._faults(boundary, values, again), None)
            if reason is not None:
                self.flow.illegal[boundary] = reason
        self.flow.walk = self._walk
        return self.flow

    def _is_outside(self, operation: int) -> bool:
        """Whether the operator of a number is part of no call of a unit."""
        place = bisect_right(self.starts, operation) - 1
        return place < 0 or operation >= self.units[place].record.last

    def _walk(self, values: Iterable[Value], stops: Collection[int]) -> tuple[set[str], set[int]]:
        parameters: set[str] = set()
        results: set[int] = set()
        left, seen = list(values), set()
        while left:
            value = left.pop()
            if value.index in seen or value.index in stops:
                continue
            seen.add(value.index)
            for operation in self.writers.get(value.storage, ()):
                if self._call_of(operation) is None:
                    left += operation.inputs
            maker = self._call_of(value.producer)
            if maker is not None:
                results.add(value.index)
                self.flow.makers.setdefault(value.index, maker)
            elif value.producer is not None:
                left += value.producer.inputs
            elif value.source.kind == "parameter":
                parameters.add(value.source.name)
        return parameters, results

    def _call_of(self, operation: Operation | None) -> int | None:
        """The call of a unit that an operator is part of."""
        if operation is None:
            return None
        place = bisect_right(self.starts, operation.index) - 1
        if place >= 0 and operation.index < self.units[place].record.last:
            return place
        return None

    def _follow(self, values: Iterable[Value], call: int) -> set[int]:
        """Note that ``call`` needs the values; gives the results of units that they are computed from."""
        found: set[int] = set()
        left, seen = list(values), set()
        while left:
            value = left.pop()
            maker = self._call_of(value.producer)
            if value.index in seen or (maker is not None and maker == call):
                continue
            seen.add(value.index)
            self.needs[value.index].add(call)
            for operation in self.writers.get(value.storage, ()):
                if self._call_of(operation) is None:
                    self._note_random(operation, call)
                    left += operation.inputs
            if maker is not None:
                self.stops[value.index], self.flow.makers[value.index] = value, maker
                found.add(value.index)
            elif value.producer is not None:
                self._note_random(value.producer, call)
                left += value.producer.inputs
            elif value.source.kind == "parameter":
                self.flow.outside.add(value.source.name)
        return found

    def _note_random(self, operation: Operation, call: int) -> None:
        is_random = torch.Tag.nondeterministic_seeded in operation.function.tags
        is_idle = operation.name == "aten.native_dropout" and operation.arguments[1] == 0
        if is_random and not is_idle:
            self.drawn[operation.index].add(call)

    def _follow_results(self) -> None:
        """The loss is needed, or the first result if there is none; others where they can be had."""
        end = len(self.units)
        outputs = [(path, value) for path, value in self.trace.outputs if value.dtype.is_floating_point]
        losses = [path for path, value in outputs if not value.shape and value.differentiable]
        self.flow.loss = next(iter(losses), None)
        needed = self.flow.loss if losses else outputs[0][0] if outputs else None
        for path, value in self.trace.outputs:
            self.flow.outputs[path] = value
            if path == needed:
                self.flow.needed = value
                self._follow([value], end)

    def _faults(self, boundary: int, values: list[Value], again: Collection[int]) -> Iterator[str]:
        path = self.units[boundary].path
        for value in values:
            maker = self.units[self.flow.makers.get(value.index, 0)].path
            if value.index not in self.returned and value.index not in self.flow.places:
                yield (
                    f"before {path} a tensor {list(value.shape)} would have to be sent that {maker} computes "
                    "but does not return: it leaves it in an attribute, or in an object that it was given"
                )
        for storage, writers in self.writers.items():
            places = {self._call_of(operation) for operation in writers}
            inside = {place for place in places if place is not None}
            values_there = [one for one in self._by_storage.get(storage, ()) if self.needs.get(one.index)]
            for value in values_there:
                maker_call = self._call_of(value.producer)
                others = places - {maker_call}
                if maker_call is not None and others and value in values:
                    yield f"before {path} a tensor would have to be sent that is written into later"
                    continue
                reached = (inside - {maker_call}) | self.needs[value.index]
                if inside - {maker_call} and min(reached) < boundary <= max(reached):
                    unit = self.units[min(inside - {maker_call})].path
                    yield f"{unit} writes into a tensor that calls on both sides of {path} read"
        for operation, calls in self.drawn.items():
            drawn = self.trace.operations[operation]
            if again:
                # what is made from results of units is not made again: what crosses has it in it
                point, reads = self.starts[boundary], list(self._reads_of(drawn, again))
            else:
                point, reads = boundary, list(calls)
            if reads and min(reads) < point <= max(reads):
                name = drawn.name
                yield (
                    f"random numbers that {name} draws outside of layers and of nn.Dropout would have to be "
                    f"the same on both sides of {path}"
                )
        for repeated in self.trace.recomputed:
            covered = [
                call.index
                for call in self.units
                if repeated.first <= call.record.first and call.record.last <= repeated.last
            ]
            if covered and repeated.reentrant:
                yield (
                    "activation checkpointing in its reentrant form hides what units return: "
                    "use use_reentrant=False"
                )
            if covered and covered[0] < boundary <= covered[-1]:
                yield f"{path} is recomputed together with what comes before it: checkpoint layers one by one"

    def _reads_of(self, operation: Operation, computed: Collection[int]) -> Iterator[int]:
        """The operators that bring together what an operator made with what units compute."""
        left, seen = [operation], {operation.index}
        while left:
            one = left.pop()
            if one is not operation and (
                self._call_of(one) is not None or any(value.index in computed for value in one.outputs)
            ):
                yield one.index
                continue
            for use in (use for value in one.outputs for use in value.uses):
                if use.index not in seen and use.index > operation.index:
                    seen.add(use.index)
                    left.append(use)

    @functools.cached_property
    def _by_storage(self) -> dict[int, list[Value]]:
        found: dict[int, list[Value]] = defaultdict(list)
        for value in self.trace.values:
            if value.storage in self.writers:
                found[value.storage].append(value)
        return found


def _written(operation: Operation) -> Iterator[Value]:
    """The values that an operator writes into."""
    schema = operation.function._schema
    if not schema.is_mutable or torch.Tag.inplace_view in operation.function.tags:
        return
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = (
                operation.arguments[position]
                if position < len(operation.arguments)
                else operation.keywords.get(argument.name)
            )
            yield from _values(given)


def _values(item: Any) -> Iterator[Value]:
    if isinstance(item, Value):
        yield item
    elif isinstance(item, tuple | list):
        for each in item:
            yield from _values(each)
