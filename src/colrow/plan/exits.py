"""Where partial sums are reduced: at the cheapest places up to which they only meet linear operators.

A partial sum may be reduced where it is made, or later: at the output of a module within which all partial
sums are added up, scaled and moved about, but not squared. So a parallel block of attention and feed-forward
is left through one all-reduce, and so are all the experts of a layer together.
"""

from __future__ import annotations

import dis
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from colrow.axes.legality import Volumes
from colrow.plan.linear import Linearity, Spread
from colrow.plan.states import States
from colrow.trace.records import FunctionCall, ModuleCall, Operation, Value
from colrow.trace.tree import Path

_FOREVER = float("inf")

#: A place at a call costs that much more than one at a module's border.
_AT_CALL = 1.001


@dataclass(frozen=True, eq=False)
class Reduction:
    """One all-reduce of a partial sum.

    Attributes:
        value: what is reduced.
        module: the call of the module whose output it is, or within which ``call`` was made.
        call: the function call whose result it is; ``None`` for the output of ``module``.
        path: where it stands in that output or result.
    """

    value: Value
    module: ModuleCall
    call: FunctionCall | None
    path: Path


@dataclass
class Reductions:
    """All reductions of a selection, and what follows from them.

    Attributes:
        all: in the order of the trace.
        partial: of each partial sum the first operation that makes it one, and the last (exclusive) that
            reads it as one; by the value's index.
        once: parameters that one rank adds, with the module calls that add them.
    """

    all: list[Reduction] = field(default_factory=list)
    partial: dict[int, tuple[int, int]] = field(default_factory=dict)
    once: list[tuple[Value, ModuleCall]] = field(default_factory=list)

    def is_partial(self, value: Value, operation: Operation) -> bool:
        """Whether the value is a partial sum when ``operation`` reads it, or has made it."""
        known = self.partial.get(value.index)
        return known is not None and known[0] <= operation.index < known[1]


@dataclass
class _Choice:
    """The cheapest way to reduce all partial sums that begin within a module call, or a function call."""

    cost: float
    here: tuple[Spread, list[tuple[Path, Value]], FunctionCall | None] | None = None
    parts: list[tuple[ModuleCall, _Choice]] = field(default_factory=list)
    failed: list[Operation] = field(default_factory=list)


def find_reductions(states: States, linearity: Linearity) -> Reductions:
    """Place the reduction of every partial sum.

    Raises:
        CannotPlaceError: if a partial sum meets an operator that needs the whole before it can be reduced.
    """
    return _Search(states, linearity).run()


class _Search:
    def __init__(self, states: States, linearity: Linearity) -> None:
        self._states, self._linearity = states, linearity
        self._trace = states.selection.trace
        self._volumes = Volumes(states.selection.axes)
        self._sources: dict[int, list[Operation]] = defaultdict(list)
        self._children: dict[int, list[ModuleCall]] = defaultdict(list)
        self._contains: set[int] = set()
        self._calls: dict[int, list[FunctionCall]] = defaultdict(list)
        for call in self._trace.calls:
            self._calls[call.module.index].append(call)
        self._returned: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for module in self._trace.modules:
            for _, value in module.outputs:
                self._returned[value.index].append((module.first, module.last))
        for value in [value for _, value in self._trace.outputs] + [one.value for one in self._trace.kept]:
            self._returned[value.index].append((0, len(self._trace.operations)))

    def run(self) -> Reductions:
        trace = self._trace
        for operation in trace.operations:
            if self._linearity.is_source(operation):
                module = operation.module
                if module is None or operation.call is None:
                    raise self._states.selection.cannot("a sum over parts that no call makes", operation)
                self._sources[module.index].append(operation)
                while module is not None and module.index not in self._contains:
                    self._contains.add(module.index)
                    module = module.parent
        for module in trace.modules:
            if module.parent is not None and module.index in self._contains:
                self._children[module.parent.index].append(module)
        found = Reductions()
        for _, root in trace.runs:
            choice = self._choose(root)
            if choice.failed:
                raise self._states.selection.cannot(
                    "what is computed from its partial sums needs the whole", choice.failed[0]
                )
            self._collect(root, choice, found)
        found.all.sort(key=lambda one: one.value.index)
        return found

    def _choose(self, module: ModuleCall) -> _Choice:
        if module.index not in self._contains:
            return _Choice(0.0)
        parts = [(child, self._choose(child)) for child in self._children[module.index]]
        calls: dict[int, FunctionCall] = {}
        for operation in self._sources[module.index]:
            assert operation.call is not None
            calls[operation.call.index] = operation.call
        parts += [(module, self._at_call(call)) for call in calls.values()]
        inside = _Choice(sum(choice.cost for _, choice in parts), parts=parts)
        inside.failed = [operation for _, choice in parts for operation in choice.failed]
        outside = self._at(module.first, module.last, module.outputs, None)
        # a hook on a module costs less than looking for a call; inner modules run on more paths than outer
        limit = inside.cost if not calls else inside.cost * (1 + 1e-9)
        best = inside
        if outside is not None and (outside.cost < limit or _is_unflattened(outside, inside)):
            best = outside
        if best is inside and inside.cost:
            best = self._where_they_meet(module, inside.cost) or inside
        return best

    def _where_they_meet(self, module: ModuleCall, limit: float) -> _Choice | None:
        """Reduce all partial sums of a module together where its own code adds them up.

        As a parallel block does before it adds what came in: attention, feed-forward and residual; or a layer
        of experts, whose weighted results are added before what came in is.
        """
        last = max(
            operation.index
            for operation in self._trace.operations[module.first : module.last]
            if self._linearity.is_source(operation)
        )
        for call in self._calls[module.index]:
            if call.last <= last or _AT_CALL * sum(map(self._volumes.of, values_in(call.outputs))) >= limit:
                continue
            found = self._at(module.first, call.last, paths_of(call.outputs), call)
            if found is not None and found.cost * _AT_CALL < limit:
                return found
        return None

    def _at_call(self, call: FunctionCall) -> _Choice:
        found = self._at(call.first, call.last, paths_of(call.outputs), call)
        if found is None:
            sources = [
                operation
                for operation in self._trace.operations[call.first : call.last]
                if self._linearity.is_source(operation)
            ]
            return _Choice(_FOREVER, failed=sources)
        return found

    def _at(
        self, first: int, last: int, outputs: list[tuple[Path, Value]], call: FunctionCall | None
    ) -> _Choice | None:
        """Reduce at the end of operations ``first`` to ``last``; ``None`` if that is not possible."""
        spread = self._linearity.spread(self._trace.operations[first:last])
        if not spread.linear:
            return None
        given = {value.index for _, value in outputs}
        leaving = [
            value
            for value, _ in spread.values.values()
            if value.index in given
            or any(use.index >= last for use in value.uses)
            # nothing may read it any more, but for whoever calls a module around
            or any(begin <= first and last <= end for begin, end in self._returned[value.index])
        ]
        if not leaving or any(value.index not in given for value in leaving):
            return None
        if call is not None and not _rebinds(call) and self._writes_into(leaving, call):
            # the program goes on with the tensor that was written into, not with the call's result
            return None
        places = [(path, value) for path, value in outputs if value in leaving]
        if len({value.index for _, value in places}) != len(places):
            return None
        return _Choice(float(sum(map(self._volumes.of, leaving))), (spread, places, call))

    def _writes_into(self, values: list[Value], call: FunctionCall) -> bool:
        """Whether the call wrote into tensors that there were before."""
        written = {
            one.index
            for operation in self._trace.operations[call.first : call.last]
            for one in operation.outputs
            if one in operation.inputs
        }
        return any(value.index in written for value in values)

    def _collect(self, module: ModuleCall, choice: _Choice, found: Reductions) -> None:
        for part, inner in choice.parts:
            self._collect(part, inner, found)
        if choice.here is None:
            return
        spread, places, call = choice.here
        until = module.last if call is None else call.last
        found.all += [Reduction(value, module, call, path) for path, value in places]
        for index, (_, since) in spread.values.items():
            found.partial[index] = (since, until)
        found.once += spread.once


def _is_unflattened(outside: _Choice, inside: _Choice) -> bool:
    """Whether it costs the same outside, and tokens there are rows of sequences again.

    Layers of experts take all tokens of a batch as one dimension. Where what leaves has one for sequences, it
    can be scattered along it.
    """
    places, before = _places(outside), _places(inside)
    return (
        outside.cost <= inside.cost
        and len(places) == len(before)
        and all(len(new.shape) > len(old.shape) for new, old in zip(places, before, strict=True))
    )


def _places(choice: _Choice) -> list[Value]:
    own = [] if choice.here is None else [value for _, value in choice.here[1]]
    return own + [value for _, part in choice.parts for value in _places(part)]


def _rebinds(call: FunctionCall) -> bool:
    """Whether the call is an operator, as in ``x += y``: then the name ``x`` gets its result."""
    return dis.opname[call.site.code.co_code[call.site.instruction]].startswith(("BINARY_OP", "INPLACE"))


def values_in(item: Any) -> list[Value]:
    """The values in a nesting of a trace."""
    return [value for _, value in paths_of(item)]


def paths_of(item: Any) -> list[tuple[Path, Value]]:
    """The values in a nesting of a trace, with their paths."""
    found: list[tuple[Path, Value]] = []

    def collect(path: Path, item: Any) -> None:
        if isinstance(item, Value):
            found.append((path, item))
        elif isinstance(item, tuple | list):
            for index, each in enumerate(item):
                collect((*path, index), each)
        elif isinstance(item, dict):
            for key, each in item.items():
                collect((*path, key), each)

    collect((), item)
    return found
