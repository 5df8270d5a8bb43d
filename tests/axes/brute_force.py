"""Rules against brute force: cut an operator's tensors by the inferred factors, run it on every part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from colrow.axes import Axes, Axis, Factor, Registry, dimension_layout, infer
from colrow.layout.cut import Cut
from colrow.trace.records import Operation, Source, Trace, Value

#: what stands against an axis without being a claim of the rule
NOT_OF_THE_RULE = ("never contracted nor in an output", "its partial sums would be attention scores")


class Extent(int):
    """An integer argument that is the size of a dimension: of input ``tensor``, or of output ``~tensor``."""

    tensor: int
    dimension: int

    def __new__(cls, value: int, tensor: int, dimension: int) -> Extent:
        made = super().__new__(cls, value)
        made.tensor, made.dimension = tensor, dimension
        return made


class Offset(int):
    """An integer argument that is a position in a dimension of input ``tensor``."""

    tensor: int
    dimension: int

    def __new__(cls, value: int, tensor: int, dimension: int) -> Offset:
        made = super().__new__(cls, value)
        made.tensor, made.dimension = tensor, dimension
        return made


class Length(int):
    """An integer argument that is the distance from ``start`` to ``start + value`` in a dimension."""

    start: Offset

    def __new__(cls, value: int, start: Offset) -> Length:
        made = super().__new__(cls, value)
        made.start = start
        return made


class Part(int):
    """An integer argument that is the size of one factor of a dimension: the number of groups."""

    pick: Callable[[Axes, Operation], Factor]

    def __new__(cls, value: int, pick: Callable[[Axes, Operation], Factor]) -> Part:
        made = super().__new__(cls, value)
        made.pick = pick
        return made


@dataclass
class Case:
    """An operator with arguments.

    Attributes:
        function, arguments, keywords: the call; integers that change with a cut are marked as such.
        free: at least this many axes must be found cuttable: a rule that blocks everything is no rule.
        special: checks a factor that is looked up, or the classes of a loss.
        compare: whether results are compared; not for random ones.
        local: the operator and arguments on a rank, if the same ones cannot express the local call.
        stand_in: computes what an operator would that does not run on this machine.
    """

    function: torch._ops.OpOverload
    arguments: Sequence[Any]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    free: int = 0
    special: Callable[[Ranks], None] | None = None
    compare: bool = True
    local: tuple[torch._ops.OpOverload, Sequence[Any]] | None = None
    stand_in: Callable[..., Any] | None = None

    def run(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Tensor]:
        """The tensors among the results."""
        result = (self.stand_in or self.function)(*arguments, **keywords)
        return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def record(case: Case) -> tuple[Trace, list[Tensor], list[Tensor]]:
    """A trace of one operation, made without the recorder; its tensors before and its results."""
    arguments, keywords = tree_map(_clone, (tuple(case.arguments), dict(case.keywords)))
    before = [leaf for leaf in tree_leaves((case.arguments, case.keywords)) if isinstance(leaf, Tensor)]
    given = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
    after = case.run(arguments, keywords)
    trace = Trace("evaluation")
    values: dict[int, Value] = {}
    for tensors, source in ((given, Source("input", "x")), (after, Source("result"))):
        for tensor in tensors:
            if id(tensor) not in values:
                shape = tuple(tensor.shape)
                value = Value(len(trace.values), shape, tensor.dtype, source, len(trace.values))
                values[id(tensor)] = value
                trace.values.append(value)
    for tensor in given:
        if tensor.dtype == torch.int64:
            values[id(tensor)].content = tensor
    recorded, named = tree_map(
        lambda leaf: values[id(leaf)] if isinstance(leaf, Tensor) else leaf, (arguments, keywords)
    )
    operation = Operation(
        0,
        case.function,
        recorded,
        named,
        tuple(values[id(tensor)] for tensor in given),
        tuple(values[id(tensor)] for tensor in after),
        None,
    )
    for value in operation.outputs:
        value.producer = operation
    trace.operations.append(operation)
    return trace, before, after


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@dataclass
class Ranks:
    """One axis of one operation, cut over some ranks."""

    case: Case
    axes: Axes
    axis: Axis
    cut: Cut
    inputs: list[Tensor]
    outputs: list[Tensor]

    @property
    def operation(self) -> Operation:
        return self.axes.trace.operations[0]

    def indices(self, factor: Factor, rank: int) -> Tensor | None:
        """The indices of a dimension that ``rank`` has; None for all."""
        if not self.axes.factors.count(factor, self.axis.atom):
            return None
        layout = dimension_layout(self.axes.factors, factor, self.axis.atom)
        return torch.tensor(
            [index for low, high in layout.ranges(self.cut, rank) for index in range(low, high)],
            dtype=torch.int64,
        )

    def size(self, factor: Factor, rank: int) -> int:
        indices = self.indices(factor, rank)
        return factor.size if indices is None else len(indices)

    def part(self, tensor: Tensor, value: Value, rank: int) -> Tensor:
        """What ``rank`` has of ``tensor``."""
        for dimension, factor in enumerate(self.axes.dimensions(value)):
            indices = self.indices(factor, rank)
            if indices is not None:
                tensor = tensor.index_select(dimension, indices)
        return tensor.clone()

    def localise(self, number: Any, rank: int) -> Any:
        """An integer argument as ``rank`` must give it."""
        operation = self.operation
        if isinstance(number, Length):
            end = Offset(number.start + number, number.start.tensor, number.start.dimension)
            return self.localise(end, rank) - self.localise(number.start, rank)
        if isinstance(number, Part):
            factor = number.pick(self.axes, operation)
            return self.size(factor, rank)
        if isinstance(number, Extent):
            value = (
                operation.inputs[number.tensor] if number.tensor >= 0 else operation.outputs[~number.tensor]
            )
            return self.size(self.axes.dimensions(value)[number.dimension], rank)
        if isinstance(number, Offset):
            factor = self.axes.dimensions(operation.inputs[number.tensor])[number.dimension]
            indices = self.indices(factor, rank)
            if indices is None:
                return int(number)
            if number < 0:
                return -int((indices >= factor.size + number).sum())
            return int((indices < number).sum())
        return number

    def arguments(self, rank: int) -> tuple[list[Any], dict[str, Any]]:
        """The local arguments of ``rank``."""
        parts = iter(
            self.part(tensor, value, rank)
            for tensor, value in zip(self.inputs, self.operation.inputs, strict=True)
        )

        def local(leaf: Any) -> Any:
            return next(parts) if isinstance(leaf, Tensor) else self.localise(leaf, rank)

        given = self.case.arguments if self.case.local is None else self.case.local[1]
        arguments, keywords = tree_map(local, (list(given), dict(self.case.keywords)))
        return arguments, keywords

    def run(self, rank: int, drop: Sequence[str] = ()) -> list[Tensor]:
        """The operator on the parts of ``rank``, with zeros in place of the arguments ``drop``."""
        arguments, keywords = self.arguments(rank)
        for name in drop:
            at = position(self.case.function, name)
            if at < len(arguments) and isinstance(arguments[at], Tensor):
                arguments[at] = torch.zeros_like(arguments[at])
        if self.case.local is not None:
            return Case(*self.case.local).run(arguments, keywords)
        return self.case.run(arguments, keywords)

    def check(self, registry: Registry) -> None:
        """Every rank's results must be its parts of the true ones, or add up to them."""
        found = registry.find(self.case.function)
        assert found is not None
        contracted = bool(self.axis.contractions)
        results = [
            self.run(rank, found.addends if contracted and rank else ()) for rank in range(self.cut.ranks)
        ]
        for index, (true, value) in enumerate(zip(self.outputs, self.operation.outputs, strict=True)):
            if contracted:
                close(sum(result[index] for result in results), true, self)
                continue
            for rank, result in enumerate(results):
                close(result[index], self.part(true, value, rank), self)


def close(found: Any, true: Tensor, ranks: Ranks) -> None:
    """Raise if two tensors differ, and say where."""

    def message(text: str) -> str:
        cut, axis = ranks.cut.counts, ranks.axis
        members = [f"{value}[{dimension}]" for value, dimension in axis.members]
        return f"{ranks.operation} cut along {members} as {cut}: {text}"

    assert isinstance(found, Tensor)
    assert found.shape == true.shape, message(f"shape {list(found.shape)}, not {list(true.shape)}")
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9, equal_nan=True, msg=message)


def position(function: torch._ops.OpOverload, name: str) -> int:
    """Where an argument stands in the operator's schema."""
    return [argument.name for argument in function._schema.arguments].index(name)


def check_cuts(case: Case, choose_cut: Callable[[int], Cut], registry: Registry) -> None:
    """Check every axis of ``case`` that the rule leaves free, cut as ``choose_cut(units)`` says."""
    trace, before, after = record(case)
    axes = infer(trace, registry)
    free = 0
    for axis in axes.all:
        against = [reason for reason in axis.illegal if not reason.text.startswith(NOT_OF_THE_RULE)]
        if against:
            continue
        free += 1
        ranks = Ranks(case, axes, axis, choose_cut(axis.size), before, after)
        if axis.iotas or not case.compare:
            continue  # content that depends on the index is made whole, and random content compared with none
        if axis.lookups or axis.losses:
            assert case.special is not None, "a marked factor needs its own check"
            case.special(ranks)
        else:
            ranks.check(registry)
    assert free >= case.free, f"{free} axes of {trace.operations[0]} may be cut, not {case.free}"


def check_linear(case: Case, registry: Registry) -> None:
    """``f(x) + f(y) = f(x + y)`` in every group of arguments of which the rule says so."""
    if not case.compare:
        return
    trace, _, after = record(case)
    for group in registry.linear(trace.operations[0]):
        first, second = list(case.arguments), list(case.arguments)
        for name in group:
            names = [argument.name for argument in case.function._schema.arguments]
            at = names.index(name) if name in names else len(first)
            if at >= len(first) or first[at] is None:
                continue
            whole = first[at]
            if any(isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in tree_leaves(whole)):
                break
            second[at] = tree_map(lambda leaf: _share(leaf), whole)
            first[at] = tree_map(lambda a, b: a - b, whole, second[at])
        else:
            parts = [record(replace(case, arguments=given))[2] for given in (first, second)]
            several = len(case.function._schema.returns) > 1
            results = list(zip(*parts, after, strict=True))
            for one, other, true in results[:1] if several else results:
                if true.is_floating_point():
                    torch.testing.assert_close(one + other, true, rtol=1e-9, atol=1e-9, msg=f"{group}")


def _share(leaf: Any) -> Any:
    return torch.randn_like(leaf) if isinstance(leaf, Tensor) else leaf / 4
