"""Whether a program computes the same on parts of a sequence, with the numbers that it has."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from colrow.localise.arguments import integers_of
from colrow.localise.solve import Solver
from colrow.localise.trial import Trials
from colrow.plan.exits import Reductions
from colrow.plan.sequence.cut import PartStates
from colrow.trace.integers import Expression, Size, TracedInt, origins
from colrow.trace.records import FunctionCall, Trace, Value


class _PartTrials(Trials):
    """Trials of calls whose results are parts, though what is made of them elsewhere may be whole."""

    def __init__(self, states: PartStates, cut: Collection[int]) -> None:
        super().__init__(states, Reductions())
        self._cut = cut

    def is_part(self, value: Value, call: FunctionCall, result: bool) -> bool:
        if result:
            return value.index in self._cut
        return value.index in self._cut or (value.index, call.index) in self._sliced_at


class Numbers:
    """Answers what is wrong with a cut, call by call.

    The length of a sequence differs from one call of a model to the next. So no number in the program can
    become a rank's own: either a call is right as it is, with sizes read from parts, or it gets the whole.
    """

    def __init__(self, trace: Trace, states: PartStates, cut: Collection[int]) -> None:
        self._trace, self._states, self._cut = trace, states, cut
        self._solver = Solver(_PartTrials(states, cut), trace.values)
        ranks = states.selection.ranks
        self._ranks = sorted({0, 1, ranks - 1})

    def fails(self, call: FunctionCall) -> bool:
        """Whether the call, of which arguments are parts, would not give the parts of its result."""
        self._states.within = call.module
        return not all(self._solver.works(call, rank, {}) for rank in self._ranks)

    def misused(self, calls: Iterable[FunctionCall]) -> set[int]:
        """Indices of the parts whose sizes are used as if they were those of the whole.

        Given to ``calls``, which deal with what is whole, or computed with.
        """
        found: set[int] = set()
        for call in calls:
            for number in integers_of(call).values():
                if isinstance(number, TracedInt):
                    found |= self._sizes(number.expression, call)
        for escape in self._trace.escapes:
            self._states.within = escape.module
            found |= self._changed(escape.expression)
        return found

    def _sizes(self, expression: Expression, call: FunctionCall) -> set[int]:
        self._states.within = call.module
        return self._changed(expression)

    def _changed(self, expression: Expression) -> set[int]:
        """The parts that give an expression another number on some rank."""
        parts = {
            origin.value_index
            for origin in origins(expression)
            if isinstance(origin, Size) and self._states.is_local(self._trace.values[origin.value_index])
        }
        if not parts:
            return parts
        for rank in self._ranks:
            try:
                if self._solver.on_rank(expression, rank, {}) != expression.value:
                    return parts
            except ZeroDivisionError:
                return parts
        return set()
