"""Which gradients are partial sums, and where they are summed: the entries of a plan.

The gradient of a replicated value is a partial sum as far as it comes from operations on parts: each rank
computes the contribution of its part. Such a contribution may flow on, through operations on replicated
values, to where it costs least to sum it: the gradients of queries, keys and values meet in what all three
are computed from, those of attention and feed-forward of a parallel block in the block's input. It must be
summed before it meets a gradient that is whole already, and a parameter on its way gets a partial gradient.
A gradient that the program writes itself (:mod:`colrow.trace.written`) may need the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from colrow.axes.legality import Volumes
from colrow.plan.exits import Reductions, paths_of
from colrow.plan.linear import operation_argument
from colrow.plan.states import States
from colrow.plan.written import WrittenGradients
from colrow.trace.records import FunctionCall, Operation, Value

#: What a collective costs however small it is, in elements.
LATENCY = 1 << 16

#: How much dearer a place at a call is than at a module's border: what happens in a loop, as over the tokens
#: of a sequence, happens more often in reality than in a trace.
_AT_CALL, _IN_LOOP = 1.001, 128.0

#: Passes of a call by which a loop is known.
_LOOP = 3


@dataclass(frozen=True, eq=False)
class _Edge:
    """A use of a value: its gradient from there is partial, whole, or that of the ``result`` it leads to."""

    operation: Operation
    kind: Literal["partial", "whole", "through"]
    result: Value | None = None


@dataclass(eq=False)
class _Node:
    """A replicated value with a gradient."""

    value: Value
    edges: list[_Edge]
    cost: float
    is_derived: bool  # computed from parts, whose gradient must be partial
    can_pass: bool  # what it is computed from is replicated too
    is_output: bool
    may_arrive: bool = False
    may_be_pure: bool = False
    is_direct: bool = False  # what arrives must be summed here or before
    best: frozenset[int] = frozenset()  # where to sum what arrives, at the least cost
    latest: frozenset[int] = frozenset()  # where to sum it as late as possible
    accepts: bool = False
    passes: bool = False

    @property
    def is_visible(self) -> bool:
        """Whether anything can be done with it."""
        return self.cost < float("inf")

    @property
    def is_used(self) -> bool:
        """Whether it gets a gradient at all."""
        return bool(self.edges) or self.is_output


@dataclass(frozen=True, eq=False)
class Summation:
    """A value whose partial gradients are summed: those from ``operations``.

    Attributes:
        value: the value, which may be a parameter.
        operations: its uses whose gradients are partial.
        everywhere: whether all of its uses are such.
    """

    value: Value
    operations: tuple[Operation, ...]
    everywhere: bool


@dataclass
class _Forced:
    accept: set[int] = field(default_factory=set)
    refuse: set[int] = field(default_factory=set)


def find_summations(states: States, reductions: Reductions, hidden: Collection[int] = ()) -> list[Summation]:
    """The values at which gradients are summed, in the order of the trace.

    Args:
        hidden: values at which nothing can be done.

    Raises:
        CannotPlaceError: if a gradient would have to be a partial sum and whole at once.
    """
    return _Search(states, reductions, hidden).run()


class _Search:
    def __init__(self, states: States, reductions: Reductions, hidden: Collection[int]) -> None:
        self._states, self._reductions, self._hidden = states, reductions, hidden
        self._selection = states.selection
        self._volumes = Volumes(self._selection.axes)
        self._written = WrittenGradients(states, reductions)
        self._nodes: dict[int, _Node] = {}
        self._order: list[_Node] = []
        self._visible: dict[int, float] = {}
        self._stops: set[int] = set()

    def run(self) -> list[Summation]:
        self._written.check()
        self._find_visible()
        self._make_nodes()
        # what is summed at a value does not flow on: once that is known, others may be better off without it
        while True:
            self._look_back()
            forced = _Forced()
            while not self._decide(forced):
                pass
            stops = {node.value.index for node in self._order if node.may_arrive and not node.passes}
            if stops <= self._stops:
                break
            self._stops |= stops
        return [found for node in self._order if (found := self._summation(node)) is not None]

    # ---------------------------------------------------------------- the graph

    def _find_visible(self) -> None:
        """Values that a hook or a call can get hold of, with how much dearer it is to do it there."""
        trace = self._selection.trace
        passes: Counter[tuple[int, int, int]] = Counter(map(_place, trace.calls))
        for call in trace.calls:
            in_loop = passes[_place(call)] >= _LOOP
            for _, value in paths_of((call.arguments, call.keywords, call.outputs)):
                known = self._visible.get(value.index)
                self._visible[value.index] = _IN_LOOP if in_loop and known is None else _AT_CALL
        for module in trace.modules:
            for _, value in module.inputs + module.outputs:
                self._visible[value.index] = 1.0
        for index in self._hidden:
            self._visible.pop(index, None)

    def _make_nodes(self) -> None:
        trace = self._selection.trace
        written: dict[int, int] = {}
        for operation in trace.operations:
            for value in operation.outputs:
                written[value.index] = operation.index
        outputs = {value.index for _, root in trace.runs for _, value in root.outputs}
        outputs |= {one.value.index for one in trace.kept}
        interesting = self._near_parts()
        for value in trace.values:
            followed = value.differentiable and not self._written.is_inside(value)
            if followed and not self._states.is_local(value) and value.index in interesting:
                self._nodes[value.index] = self._node(value, value.index in outputs)
        self._order = sorted(
            self._nodes.values(), key=lambda node: (written.get(node.value.index, -1), node.value.index)
        )

    def _near_parts(self) -> set[int]:
        """Values from which a partial gradient can come or to which it can flow."""
        found: set[int] = set()
        for operation in reversed(self._selection.trace.operations):
            touched = any(
                self._states.made_local(value)
                or value.index in found
                or self._reductions.is_partial(value, operation)
                for value in operation.outputs
            ) or any(self._states.is_local(value) for value in operation.inputs)
            if touched:
                found.update(value.index for value in operation.inputs)
                found.update(value.index for value in operation.outputs)
        return found

    def _node(self, value: Value, is_output: bool) -> _Node:
        edges: list[_Edge] = []
        seen: set[int] = set()
        for operation in value.uses:
            if operation.index not in seen and not self._reductions.is_partial(value, operation):
                seen.add(operation.index)
                edges += self._edges(value, operation)
        producer = value.producer
        partial = value.index in self._reductions.partial
        derived = can_pass = False
        if producer is not None:
            local = any(self._states.is_local(one) for one in self._written.given(value))
            looked_up = self._selection.looks_up(producer)
            derived = local and not partial and not looked_up and not self._states.made_local(value)
            can_pass = not partial and not self._states.made_local(value) and (derived or not local)
            can_pass = can_pass and not self._written.needs_sum(value)
        return _Node(value, edges, self._cost(value), derived, can_pass, is_output)

    def _cost(self, value: Value) -> float:
        if value.source.kind == "parameter":
            return self._volumes.of(value) + LATENCY
        return (self._volumes.of(value) + LATENCY) * self._visible.get(value.index, float("inf"))

    def _edges(self, value: Value, operation: Operation) -> list[_Edge]:
        if value in operation.outputs:
            return []  # written in place: what it held before has no other gradient
        made = self._written.made(value, operation)
        results = [one for one in made if one.differentiable]
        if not results or self._selection.looks_up(operation):
            return []
        if operation in self._states.slices.get(value.index, ()):
            return [_Edge(operation, "whole")]
        if any(self._states.made_local(one) for one in results):
            return [_Edge(operation, "partial")]
        if any(self._reductions.is_partial(one, operation) for one in results):
            return [_Edge(operation, "whole" if self._is_added(value, operation) else "partial")]
        return [_Edge(operation, "through", one) for one in results]

    def _is_added(self, value: Value, operation: Operation) -> bool:
        """Whether the value is added to a partial sum, rather than multiplied with it."""
        registry = self._selection.axes.registry
        rule = registry.find(operation.function)
        assert rule is not None
        partial = [one for one in operation.inputs if self._reductions.is_partial(one, operation)]
        if not partial:
            return any(operation_argument(operation, name) is value for name in rule.addends)
        for group in registry.linear(operation):
            members = [one for name in group for one in _flat(operation_argument(operation, name))]
            if all(any(one is other for other in members) for one in [value, *partial]):
                return True
        return False

    # ---------------------------------------------------------------- decisions

    def _look_back(self) -> None:
        """From the last value to the first: where partial gradients may arrive, and what their sums cost."""
        for node in reversed(self._order):
            best: frozenset[int] = frozenset()
            latest: frozenset[int] = frozenset()
            arrives = direct = False
            pure = not node.is_output
            for edge in node.edges:
                behind = self._behind(edge) if edge.kind == "through" else None
                if behind is not None and not behind.is_used:
                    continue
                if edge.kind == "partial":
                    arrives = direct = True
                elif behind is not None and self._may_pass(behind):
                    best, latest, arrives = best | behind.best, latest | behind.latest, True
                    direct = direct or (behind.is_direct and not behind.is_visible)
                else:
                    pure = False
            node.may_be_pure, node.may_arrive, node.is_direct = pure and arrives, arrives, direct
            if direct:
                best = latest = frozenset([node.value.index] if node.is_visible else [])
            else:
                best = min(latest, best, key=self._total)
            node.accepts = direct or node.cost < self._total(best)
            node.best = frozenset([node.value.index]) if node.accepts and node.is_visible else best
            node.latest = latest

    def _may_pass(self, node: _Node) -> bool:
        """Whether a partial gradient might flow on, together with those of an operator's other results."""
        return all(
            one.may_be_pure and one.can_pass and one.value.index not in self._stops
            for one in self._siblings(node)
        )

    def _siblings(self, node: _Node) -> list[_Node]:
        """The results of the operator that made it, itself included: their gradients go into it together."""
        found = [self._nodes.get(value.index) for value in self._written.together(node.value)]
        return [one for one in found if one is not None and (one.is_used or one is node)] or [node]

    def _total(self, places: frozenset[int]) -> float:
        return sum(self._nodes[index].cost for index in places)

    def _behind(self, edge: _Edge) -> _Node | None:
        assert edge.result is not None
        return self._nodes.get(edge.result.index)

    def _decide(self, forced: _Forced) -> bool:
        """From the first value to the last: which pass a partial gradient on. False: something was forced."""
        for node in self._order:
            node.passes = False
            if not node.may_arrive:
                if node.is_derived and node.is_used:
                    self._check_unused(node)
                continue
            index = node.value.index
            sources = self._sources(node)
            demanded = node.is_derived or any(source.is_derived and source.passes for source in sources)
            willing = all(source.passes or self._accepts(source, forced) for source in sources)
            if demanded and not willing:
                unwilling = [one for one in sources if not (one.passes or self._accepts(one, forced))]
                forced.accept.update(one.value.index for one in unwilling)
                return False
            possible = node.can_pass and node.may_be_pure and index not in forced.refuse
            if node.is_derived and not possible:
                raise self._selection.cannot(
                    "its gradient would be a partial sum and whole at once", node.value.producer, node.value
                )
            node.passes = possible and willing and bool(sources or node.is_derived)
        return self._check_purity(forced)

    def _check_unused(self, node: _Node) -> None:
        raise self._selection.cannot(
            "a value that is the same on all ranks is computed from parts, but its gradient is not partial",
            node.value.producer,
            node.value,
        )

    def _accepts(self, node: _Node, forced: _Forced) -> bool:
        return node.is_visible and (node.accepts or node.value.index in forced.accept)

    def _sources(self, node: _Node) -> list[_Node]:
        given = self._written.given(node.value)
        found = (self._nodes.get(value.index) for value in given if value is not node.value)
        return [one for one in found if one is not None]

    def _check_purity(self, forced: _Forced) -> bool:
        """What passes a gradient on must get partial ones only."""
        stable = True
        for node in self._order:
            if not node.passes:
                continue
            for edge in node.edges:
                behind = self._behind(edge) if edge.kind == "through" else None
                if behind is not None and behind.is_used and not behind.passes:
                    forced.refuse.add(node.value.index)
                    stable = False
            if not all(one.passes for one in self._siblings(node)):
                forced.refuse.update(one.value.index for one in self._siblings(node))
                stable = False
        return stable

    def _summation(self, node: _Node) -> Summation | None:
        if node.passes:
            return None
        partial, everywhere = [], not node.is_output
        for edge in node.edges:
            behind = self._behind(edge) if edge.kind == "through" else None
            if edge.kind == "partial" or (behind is not None and behind.passes):
                partial.append(edge.operation)
            elif behind is None or behind.is_used:
                everywhere = False
        if not partial:
            return None
        if self._written.is_shown(node.value):
            raise self._selection.cannot(
                "a hook would be shown a part of a sum of gradients", partial[0], node.value
            )
        operations = {operation.index: operation for operation in partial}
        return Summation(node.value, tuple(operations.values()), everywhere)


def _place(call: FunctionCall) -> tuple[int, int, int]:
    return (call.module.index, id(call.site.code), call.site.instruction)


def _flat(item: object) -> list[object]:
    return list(item) if isinstance(item, list | tuple) else [item]
