"""Through which operators gradients flow in a step: those of what is trained, from what is differentiated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from math import prod

from colrow.trace.records import ModuleCall, Operation, Trace, Value


class GradientFlow:
    """What a backward pass reaches.

    A trace takes every parameter to be trained, as a plan must hold whatever is frozen or not. What happens
    in a step depends on it, and on what the step differentiates: the model's own loss where a run returns
    one, else all outputs of the run.

    Args:
        trace: of all runs.
        frozen: names of parameters that want no gradient.
    """

    def __init__(self, trace: Trace, frozen: Collection[str] = ()) -> None:
        wanting = {
            value.index
            for value in trace.values
            if value.producer is None and value.differentiable and value.source.name not in frozen
        }
        sharing: dict[int, list[Value]] = defaultdict(list)
        for value in trace.values:
            if value.differentiable:
                sharing[value.storage].append(value)
        for operation in trace.operations:
            if any(value.index in wanting for value in operation.inputs):
                made = (one for value in operation.outputs for one in _made(operation, value, sharing))
                wanting.update(value.index for value in made if value.differentiable)
        reached = {value.index for _, root in trace.runs for value in _differentiated(root)}
        self._operations: set[int] = set()
        for operation in reversed(trace.operations):
            made = (one for value in operation.outputs for one in _made(operation, value, sharing))
            if any(value.index in reached and value.index in wanting for value in made):
                self._operations.add(operation.index)
                reached.update(value.index for value in operation.inputs)
        self._values = wanting & reached

    def reaches(self, value: Value) -> bool:
        """Whether the value gets a gradient."""
        return value.index in self._values

    def through(self, operation: Operation) -> bool:
        """Whether the operator has a backward."""
        return operation.index in self._operations


def _made(operation: Operation, value: Value, sharing: Mapping[int, list[Value]]) -> list[Value]:
    """What an operator's result is: if it is written in place, everything that shares its memory."""
    return sharing[value.storage] if value.differentiable and value in operation.inputs else [value]


def _differentiated(root: ModuleCall) -> list[Value]:
    """The outputs of a run from which its gradients come."""
    outputs = [(path, value) for path, value in root.outputs if value.differentiable]
    numbers = [(path, value) for path, value in outputs if prod(value.shape) == 1]
    losses = [value for path, value in numbers if path == ("loss",)] or [value for _, value in numbers[:1]]
    return losses or [value for _, value in outputs]
