"""Values between units that cross a boundary in place of what many earlier units returned.

Where residuals are added outside of layers, the sum so far is one value, and what it was summed from are
many. Such a value is known again, while a model runs, by the call of a torch function that makes it: its
place in the program, and how often that was passed outside of units.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch.overrides import TorchFunctionMode

from colrow.trace.records import Operation, Trace, Value
from colrow.trace.sites import call_site

_COMPUTING = frozenset(
    ("add", "__add__", "__radd__", "sub", "__sub__", "rsub", "__rsub__", "mul", "__mul__", "__rmul__", "cat")
)
"""Functions that always make a new tensor, so that passing their places counts the same each time."""


@dataclass(frozen=True)
class Place:
    """A call of a torch function in the model's program.

    Attributes:
        function: its name.
        code, instruction: of the caller.
        passed: how often the place was passed before, outside of units.
    """

    function: str
    code: CodeType
    instruction: int
    passed: int


def places_of(trace: Trace, is_outside: Callable[[int], bool]) -> dict[int, Place]:
    """By index of value, the calls outside of units that make values which can be known again."""
    found: dict[int, Place] = {}
    passed: dict[tuple[CodeType, int], int] = defaultdict(int)
    for call in trace.calls:
        if not is_outside(call.first):
            continue
        key = (call.site.code, call.site.instruction)
        if call.name in _COMPUTING and isinstance(call.outputs, Value):
            found[call.outputs.index] = Place(call.name, *key, passed[key])
        passed[key] += 1
    return found


class Live:
    """Which values that are computed before a point are read after it.

    Args:
        trace: of the model.
        starts: the first operator of each call of a unit.
        call_of: the call of a unit that an operator is part of.
        is_needed: whether anything needs a value.
    """

    def __init__(
        self,
        trace: Trace,
        starts: Sequence[int],
        call_of: Callable[[Operation | None], int | None],
        is_needed: Callable[[Value], bool],
    ) -> None:
        self._starts = starts
        self.computed: set[int] = set()
        """Indices of values that depend on what units compute."""
        self._spans: list[tuple[int, int, Value]] = []
        for operation in trace.operations:
            inside = call_of(operation) is not None
            if inside or any(value.index in self.computed for value in operation.inputs):
                self.computed.update(value.index for value in operation.outputs)
        for value in trace.values:
            if value.producer is None or value.index not in self.computed:
                continue
            uses = [
                use.index
                for use in value.uses
                if call_of(use) is not None or any(map(is_needed, use.outputs))
            ]
            if uses:
                self._spans.append((value.producer.index, max(uses), value))

    def at(self, boundary: int) -> list[Value]:
        """The values that are computed before a boundary and read after it, in order."""
        start = self._starts[boundary]
        return [value for made, last, value in self._spans if made < start <= last]


def bytes_of(values: Sequence[Value]) -> int:
    """Bytes of values, with the example's sizes."""
    return sum(math.prod(value.shape) * value.dtype.itemsize for value in values)


class Substituting(TorchFunctionMode):
    """Gives values that were received in place of calls that make them, and keeps those that are to be sent.

    Args:
        places: by index of value.
        received: by index of value.
        keep: called with the index and the tensor of others.
        is_outside: whether no unit computes at the moment.
    """

    def __init__(
        self,
        places: Mapping[int, Place],
        received: Mapping[int, Any],
        keep: Callable[[int, Any], None],
        is_outside: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._values = {(one.code, one.instruction, one.passed): index for index, one in places.items()}
        self._names = {one.function for one in places.values()}
        self._received, self._keep, self._is_outside = received, keep, is_outside
        self._passed: dict[tuple[CodeType, int], int] = defaultdict(int)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if getattr(function, "__name__", "") not in self._names or not self._is_outside():
            return function(*args, **keywords)
        site = call_site(function)
        key = (site.code, site.instruction)
        index = self._values.get((*key, self._passed[key]))
        self._passed[key] += 1
        if index is None:
            return function(*args, **keywords)
        if index in self._received:
            return self._received[index]
        result = function(*args, **keywords)
        self._keep(index, result)
        return result
