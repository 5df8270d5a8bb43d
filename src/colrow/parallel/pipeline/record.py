"""Recording a model's calls of its units: in which order, and what each is given and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from colrow.apply.unshard import unshard
from colrow.forwards import OwnForward, take_back
from colrow.parallel.pipeline.units import units_of
from colrow.state import is_parallelized
from colrow.trace import Example, Trace, trace_together
from colrow.trace.meta import copy_with_tensors, meta_copy
from colrow.trace.records import ModuleCall, Value
from colrow.trace.tree import Path, is_object, tensors_by_path

MODE = "training"


@dataclass(frozen=True)
class UnitCall:
    """One call of a unit.

    Attributes:
        index: position in the order of calls.
        path: the unit.
        record: the call in the trace.
        result: what it returned, tensors on the meta device.
        outputs: the tensors in the result: path, tensor, value.
        given: of values that it was given: the path in its arguments; positions are numbers, keywords names.
        objects: of mutable objects in the result that it was given: the same.
    """

    index: int
    path: str
    record: ModuleCall
    result: Any
    outputs: tuple[tuple[Path, Tensor, Value], ...]
    given: Mapping[int, Path]
    objects: tuple[tuple[Any, Path], ...]


@dataclass(frozen=True)
class Recording:
    """A call of a model: its trace and, in order, its calls of units.

    Attributes:
        trace: of the original model, in training mode.
        calls: the calls of units that are not part of another unit's call.
        parameters: of each unit by path: the names of its parameters.
    """

    trace: Trace
    calls: tuple[UnitCall, ...]
    parameters: Mapping[str, frozenset[str]]


@dataclass
class _Seen:
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any


class _Watching(OwnForward):
    """Keeps what a unit is given and returns."""

    def __init__(self, module: nn.Module, seen: list[_Seen]) -> None:
        super().__init__(module)
        self._seen = seen

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        entry = _Seen(arguments, keywords, None)
        entry.result = self._inner(arguments, keywords)
        self._seen.append(entry)
        return entry.result


def record_units(model: nn.Module, example: Example) -> Recording:
    """Record one call of a model, which may be parallelized, on the meta device; it stays as it is.

    Raises:
        TraceError: if it cannot be recorded.
    """
    twin, originals = meta_copy(model)
    if is_parallelized(twin):
        unshard(twin)
    units = units_of(twin)
    seen: dict[str, list[_Seen]] = {path: [] for path in units}
    for path, module in units.items():
        _Watching(module, seen[path]).attach()
    names = {id(one): name for name, one in twin.named_parameters()}
    parameters = {
        path: frozenset(names[id(one)] for one in module.parameters()) for path, module in units.items()
    }
    try:
        # which experts are chosen does not matter for what passes between units
        trace = trace_together(twin, {MODE: example}, routing="guess", copy_layers=False, originals=originals)
    finally:
        for module in units.values():
            take_back(module)
    return Recording(trace, tuple(_calls(trace, seen)), parameters)


def _calls(trace: Trace, seen: dict[str, list[_Seen]]) -> list[UnitCall]:
    """The calls of units in order; those within another's call belong to that one."""
    queues = {path: iter(entries) for path, entries in seen.items()}
    calls: list[UnitCall] = []
    # an inner call ends, and is seen, before the call around it: so each unit's calls are matched by number
    for record in trace.modules:
        if record.path not in queues:
            continue
        entry = next(queues[record.path])
        if any(_is_within(record, call.record) for call in calls[-1:]):
            continue
        calls.append(_unit_call(len(calls), record, entry))
    return calls


def _is_within(inner: ModuleCall, outer: ModuleCall) -> bool:
    parent = inner.parent
    while parent is not None:
        if parent is outer:
            return True
        parent = parent.parent
    return False


def _unit_call(index: int, record: ModuleCall, entry: _Seen) -> UnitCall:
    tensors = dict(tensors_by_path(entry.result, inside_result=True))
    given = {value.index: path for path, value in reversed(record.inputs)}
    objects: list[tuple[Any, Path]] = []
    arguments: dict[int, Path] = {}
    given_items: list[tuple[int | str, Any]] = [*enumerate(entry.arguments), *entry.keywords.items()]
    for name, item in given_items:
        arguments[id(item)] = (name,)
    for item in _leaves(entry.result):
        if id(item) in arguments and is_object(item):
            objects.append((item, arguments[id(item)]))
    # without the graph that led to them
    memo: dict[int, Any] = {id(item): item for item, _ in objects}
    result = copy_with_tensors(entry.result, _alone, memo)
    outputs = tuple(
        (path, memo[id(tensors[path])], value) for path, value in record.outputs if path in tensors
    )
    return UnitCall(index, record.path, record, result, outputs, given, tuple(objects))


def _alone(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def without_trace(call: UnitCall) -> UnitCall:
    """What a run of the call needs of it: the trace is large, and is let go of."""
    outputs = tuple((path, tensor, alone(value)) for path, tensor, value in call.outputs)
    record = ModuleCall(call.record.index, call.path, None, call.record.first)
    return replace(call, record=record, outputs=outputs)


def alone(value: Value) -> Value:
    """A value without the operators that made it and read it."""
    return Value(value.index, value.shape, value.dtype, value.source, value.storage)


def _leaves(item: Any) -> list[Any]:
    if isinstance(item, tuple | list):
        return [leaf for each in item for leaf in _leaves(each)]
    if isinstance(item, dict):
        return [leaf for each in item.values() for leaf in _leaves(each)]
    return [item]
