"""Gradients that the program writes itself, under a selection: between which values they stand.

To a plan such a function is one step from what goes in to what comes out. What its forward computes in
between has no gradient that anything could be done with.
"""

from __future__ import annotations

from collections.abc import Sequence

from colrow.localise.arguments import integers_of
from colrow.localise.trial import Trials
from colrow.plan.exits import Reductions
from colrow.plan.states import States
from colrow.trace.custom import is_custom
from colrow.trace.records import Operation, Value, WrittenGradient
from colrow.trace.written import is_linear, judge


class WrittenGradients:
    """Answers how gradients get through a program's own functions, and through all else by its operators.

    Args:
        states, reductions: of the selection.
    """

    def __init__(self, states: States, reductions: Reductions) -> None:
        self._states, self._reductions = states, reductions
        self._selection = states.selection
        axes = self._selection.axes
        self._all = judge(axes.trace, axes.unknown)
        self._of_result: dict[int, WrittenGradient] = {}
        self._of_operation: dict[int, WrittenGradient] = {}
        self._shown: set[int] = set()
        self._inside: set[int] = set()
        for written in self._all:
            ends = {value.index for value in (*written.inputs, *written.outputs)}
            self._of_result.update((value.index, written) for value in written.outputs)
            if written.kind == "hook" and not written.outputs:
                self._shown.update(ends)
            for operation in axes.trace.operations[written.first : written.last]:
                self._of_operation[operation.index] = written
                self._inside.update(value.index for value in operation.outputs if value.index not in ends)

    def check(self) -> None:
        """Refuse what would be silently wrong.

        Raises:
            CannotPlaceError: if a function that is not linear in the gradient is cut so that ranks share
                parts, whose gradients are summed afterwards, or if a function does not give parts for parts.
        """
        trials = Trials(self._states, self._reductions)
        for call in self._selection.trace.calls:
            # those with integers are tried when these are made local
            if not is_custom(call) or any(abs(one) > 1 for one in integers_of(call).values()):
                continue
            every = range(self._selection.ranks)
            if trials.concerns(call) and not all(trials.works(call, rank, {}) for rank in every):
                raise self._selection.cannot(
                    "the function does not give parts for parts",
                    self._selection.trace.operations[call.first],
                )
        for written in self._all:
            if is_linear(written):
                continue
            for value in (*written.inputs, *written.outputs):
                chosen = self._selection.chosen_of(value)
                if chosen is None or not self._states.made_local(value):
                    continue
                if self._selection.sharding(value).layout.is_shared(chosen.cut):
                    raise self._selection.cannot(
                        f"the backward of {written.name} needs the sum over ranks that share a part",
                        *self._selection.trace.operations[written.first : written.last][:1],
                        value,
                    )

    def is_inside(self, value: Value) -> bool:
        """Whether the value is made and used within a function alone."""
        return value.index in self._inside

    def is_shown(self, value: Value) -> bool:
        """Whether a hook is shown the value's gradient by whatever reads it."""
        return value.index in self._shown

    def needs_sum(self, value: Value) -> bool:
        """Whether the value's gradient goes into something that is not linear in it."""
        written = self._of_result.get(value.index)
        return written is not None and not is_linear(written)

    def given(self, value: Value) -> Sequence[Value]:
        """What gets a gradient from that of the value: what it was made from."""
        written = self._of_result.get(value.index)
        if written is not None:
            return written.inputs
        return () if value.producer is None else value.producer.inputs

    def together(self, value: Value) -> Sequence[Value]:
        """The values whose gradients go into the same step as that of the value."""
        written = self._of_result.get(value.index)
        if written is not None:
            return written.outputs
        return () if value.producer is None else value.producer.outputs

    def made(self, value: Value, operation: Operation) -> Sequence[Value]:
        """What is made from the value by an operation, or by the function that it is a step of."""
        written = self._of_operation.get(operation.index)
        if written is not None and any(value is one for one in written.inputs):
            return written.outputs
        return operation.outputs
