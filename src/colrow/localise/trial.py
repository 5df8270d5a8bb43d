"""Trying a call on a rank's parts: does it give the rank's part of what the call on whole values gives?

Nothing is known about the function. It is run on small random numbers in float64, once whole and once for
each rank, with integers changed as proposed, and the results are compared. So a slice that starts at a wrong
place is found as well as a wrong shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from colrow.axes.cutting import held_indices
from colrow.localise.arguments import changed, values_of
from colrow.plan.exits import Reductions
from colrow.plan.selection import Selection
from colrow.plan.states import States
from colrow.trace.records import FunctionCall, Value
from colrow.trace.tree import Path

#: Calls on more elements than this are tried by their shapes only.
LARGEST = 1 << 23

#: Integers of which nothing is known are tried as zeros, and as random ones below this.
INTEGERS = 3

Numbers = Mapping[Path, "int | tuple[int, ...]"]
"""Integers of a call that are changed, by their path."""


class Trials:
    """Tries calls under a selection, and remembers the outcome for calls that are alike."""

    def __init__(self, states: States, reductions: Reductions) -> None:
        self._states, self._reductions = states, reductions
        self._selection: Selection = states.selection
        self._held = [self._all_held(rank) for rank in range(self._selection.ranks)]
        self._indices: dict[tuple[object, ...], Tensor | None] = {}
        self._keys: dict[int, tuple[object, ...]] = {}
        self._outcomes: dict[tuple[object, ...], bool] = {}
        self._sliced_at = {
            (index, operation.call.index)
            for index, operations in states.slices.items()
            for operation in operations
            if operation.call is not None
        }

    def _all_held(self, rank: int) -> dict[int, tuple[int, int]]:
        held: dict[int, tuple[int, int]] = {}
        for one in self._selection.chosen:
            held.update(one.held(rank))
        return held

    # ---------------------------------------------------------------- what a rank has

    def is_part(self, value: Value, call: FunctionCall, result: bool) -> bool:
        """Whether a rank gives ``call`` a part of the value, or gets one from it."""
        if result:
            made = value.producer
            was_there = made is not None and made.index < call.first  # it has been written into
            return self._states.is_local(value) if was_there else self._states.made_local(value)
        return self._states.is_local(value) or (value.index, call.index) in self._sliced_at

    def concerns(self, call: FunctionCall) -> bool:
        """Whether a call deals with parts at all."""
        inputs = values_of((call.arguments, call.keywords))
        return any(self.is_part(value, call, False) for value in inputs) or any(
            self.is_part(value, call, True) for value in values_of(call.outputs)
        )

    def indices(self, value: Value, dimension: int, rank: int) -> Tensor | None:
        """The indices of a dimension that a rank has; ``None`` if all."""
        factor = self._selection.axes.dimensions(value)[dimension]
        if factor.size <= 1:
            return None
        key = (factor.index, rank)
        if key not in self._indices:
            self._indices[key] = held_indices(self._selection.axes.factors, factor, self._held[rank])
        return self._indices[key]

    def local_size(self, value: Value, dimension: int, rank: int, *, sliced: bool = False) -> int:
        """The extent of a dimension on a rank; with ``sliced`` also of what is sliced somewhere."""
        if not self._states.is_local(value) and not (sliced and value.index in self._states.slices):
            return value.shape[dimension]
        kept = self.indices(value, dimension, rank)
        return value.shape[dimension] if kept is None else len(kept)

    def _part(self, tensor: Tensor, value: Value, rank: int) -> Tensor:
        for dimension in range(len(value.shape)):
            kept = self.indices(value, dimension, rank)
            if kept is not None:
                tensor = tensor.index_select(dimension, kept.to(tensor.device))
        return tensor

    # ---------------------------------------------------------------- trying

    def works(self, call: FunctionCall, rank: int, numbers: Numbers) -> bool:
        """Whether the call on the parts of ``rank``, with ``numbers`` changed, gives its parts."""
        key = (self._signature(call), rank, tuple(sorted(numbers.items(), key=str)))
        if key not in self._outcomes:
            self._outcomes[key] = self._try(call, rank, numbers)
        return self._outcomes[key]

    def _signature(self, call: FunctionCall) -> tuple[object, ...]:
        if call.index not in self._keys:
            parts: list[object] = []

            def add(path: Path, item: Any) -> Any:
                if isinstance(item, Value):
                    kinds = (
                        self.is_part(item, call, False),
                        self.is_part(item, call, True),
                        self._is_partial(item, call, False),
                        self._is_partial(item, call, True),
                    )
                    cuts = tuple(self._cut_key(item, dimension) for dimension in range(len(item.shape)))
                    parts.append((path, item.shape, item.dtype, kinds, cuts))
                else:
                    parts.append((path, int(item) if isinstance(item, int) else repr(item)))
                return item

            changed(call, add)
            for value in values_of(call.outputs):
                add(("result",), value)
            self._keys[call.index] = (id(call.function), *parts)
        return self._keys[call.index]

    def _cut_key(self, value: Value, dimension: int) -> tuple[tuple[int, ...], ...] | None:
        if not self._selection.is_cut(value):
            return None
        found = [self.indices(value, dimension, rank) for rank in range(min(2, len(self._held)))]
        return None if found[0] is None else tuple(tuple(one.tolist()) for one in found if one is not None)

    def _is_partial(self, value: Value, call: FunctionCall, result: bool) -> bool:
        known = self._reductions.partial.get(value.index)
        if known is None:
            return False
        return known[0] < call.last <= known[1] if result else known[0] < call.first < known[1]

    def _try(self, call: FunctionCall, rank: int, numbers: Numbers) -> bool:
        given = values_of((call.arguments, call.keywords))
        results = values_of(call.outputs)
        by_shape = self._by_shape(call, [*given, *results])
        try:
            found = self._results(call, rank, numbers, by_shape, 1)
        except Exception:
            # whatever a function does with wrong numbers, it does not work
            return False
        if not self._are_parts(call, found, rank, by_shape):
            return False
        if by_shape or not self._are_integers(call):
            return True
        try:
            found = self._results(call, rank, numbers, by_shape, INTEGERS)
        except Exception:
            return True  # these integers mean something to it, which says nothing about the numbers
        changed_shape = any(one.shape != value.shape for one, value in zip(found[0], results, strict=False))
        return changed_shape or self._are_parts(call, found, rank, by_shape)

    def _results(
        self, call: FunctionCall, rank: int, numbers: Numbers, by_shape: bool, integers: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the call gives on whole values, and on the parts of ``rank``."""
        given = values_of((call.arguments, call.keywords))
        data = {value.index: self._data(value, by_shape, integers) for value in given}
        with torch.no_grad():
            return self._run(call, data, None, {}), self._run(call, data, rank, numbers)

    def _are_parts(
        self, call: FunctionCall, found: tuple[list[Tensor], list[Tensor]], rank: int, by_shape: bool
    ) -> bool:
        whole, local = found
        results = values_of(call.outputs)
        if len(whole) != len(results) or len(local) != len(results):
            return False
        return all(
            self._same(call, value, one, other, rank, by_shape)
            for value, one, other in zip(results, whole, local, strict=True)
        )

    @staticmethod
    def _are_integers(call: FunctionCall) -> bool:
        """Whether integers of which nothing is known go in, and integers alone come out.

        What makes other numbers of them takes them for indices or counts, for which few integers are right.
        """
        return any(
            value.content is None and _is_integer(value)
            for value in values_of((call.arguments, call.keywords))
        ) and all(_is_integer(value) or value.dtype == torch.bool for value in values_of(call.outputs))

    def _by_shape(self, call: FunctionCall, values: list[Value]) -> bool:
        """Whether only shapes can be compared: what is random, empty or too large."""
        if max((prod(value.shape) for value in values), default=0) > LARGEST:
            return True
        registry = self._selection.axes.registry
        for operation in self._selection.trace.operations[call.first : call.last]:
            rule = registry.find(operation.function)
            if (rule is not None and rule.random) or "empty" in operation.name:
                return True
        return False

    def _data(self, value: Value, by_shape: bool, integers: int) -> Tensor:
        """Random numbers in place of a value; of integers these are below ``integers``."""
        if by_shape:
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        if value.content is not None and not value.dtype.is_floating_point:
            return value.content.clone()
        generator = torch.Generator().manual_seed(value.index)
        if value.dtype.is_floating_point or value.dtype.is_complex:
            dtype = torch.complex128 if value.dtype.is_complex else torch.float64
            return torch.rand(value.shape, generator=generator, dtype=dtype) + 0.1
        if value.dtype == torch.bool:
            return torch.rand(value.shape, generator=generator) > 0.5
        return torch.randint(integers, value.shape, generator=generator).to(value.dtype)

    def _run(
        self, call: FunctionCall, data: dict[int, Tensor], rank: int | None, numbers: Numbers
    ) -> list[Tensor]:
        made: dict[int, Tensor] = {}
        device = next(iter(data.values())).device if data else torch.device("cpu")

        def build(path: Path, item: Any) -> Any:
            if isinstance(item, Value):
                if item.index not in made:
                    made[item.index] = self._given(call, item, data[item.index], rank)
                return made[item.index]
            if isinstance(item, int) and not isinstance(item, bool):
                return numbers.get(path, int(item))
            if isinstance(item, torch.device):
                return device
            if isinstance(item, torch.dtype) and (item.is_floating_point or item.is_complex):
                return torch.complex128 if item.is_complex else torch.float64
            return item

        arguments, keywords = changed(call, build)
        # shapes are given as tuples of numbers, some of which may have become lists of sizes
        result = call.function(*arguments, **keywords)
        if call.name == "__setitem__":
            result = arguments[0]
        return _tensors(result)

    def _given(self, call: FunctionCall, value: Value, tensor: Tensor, rank: int | None) -> Tensor:
        if rank is None:
            return tensor.clone()
        if self.is_part(value, call, False):
            tensor = self._part(tensor, value, rank)
        return tensor.clone()

    def _same(
        self, call: FunctionCall, value: Value, whole: Tensor, local: Tensor, rank: int, by_shape: bool
    ) -> bool:
        expected = self._part(whole, value, rank) if self.is_part(value, call, True) else whole
        if expected.shape != local.shape:
            return False
        if by_shape or self._is_partial(value, call, True) or not expected.numel():
            return True
        if not expected.is_floating_point() and not expected.is_complex():
            return torch.equal(expected, local)
        return torch.allclose(expected, local, rtol=1e-9, atol=1e-12, equal_nan=True)


def _is_integer(value: Value) -> bool:
    return not (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool)


def _tensors(item: Any) -> list[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, tuple | list):
        return [tensor for each in item for tensor in _tensors(each)]
    if isinstance(item, dict):
        return [tensor for each in item.values() for tensor in _tensors(each)]
    return []
