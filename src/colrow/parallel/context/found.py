"""What has been found out about a sequence on the way through a recorded program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set

from colrow.axes import Axes
from colrow.localise.arguments import integers_of
from colrow.parallel.context.comparisons import number_at, sizes_in
from colrow.parallel.context.plan import ContextPlan, Extent
from colrow.parallel.context.token_axis import TokenAxis
from colrow.plan.places import Path
from colrow.trace.integers import Size, TracedInt, origins
from colrow.trace.records import FunctionCall, ModuleCall, Value

Course = tuple[int, int]
"""How many attentions and losses there are in a call of a model."""


class Found:
    """The state of one attempt.

    Args:
        axes: of the trace.
        kept: indices of values that stay whole, as what mixes tokens is made of them.

    Attributes:
        plan: what has to be done so far.
        axis: the sequence of the run that is gone through.
        cut: where the tokens lie in the values of which each rank has its own, by their indices.
        constants: indices of what is made of constant arguments alone.
        of_all: indices of what is made of gathered tokens.
        arguments: whole values of which calls are given a rank's tokens, with these calls.
        to_try: calls on parts that are given numbers.
        courses: of the runs that have been gone through.
    """

    def __init__(self, axes: Axes, kept: Set[int]) -> None:
        self.axes, self.trace, self.kept = axes, axes.trace, kept
        self.plan = ContextPlan()
        self.axis = TokenAxis(axes, ())
        self.cut: dict[int, Extent] = {}
        self.constants: set[int] = set()
        self.of_all: set[int] = set()
        self.arguments: dict[int, list[tuple[Value, FunctionCall]]] = defaultdict(list)
        self.to_try: list[FunctionCall] = []
        self.courses: list[tuple[ModuleCall, Course]] = []

    @property
    def dimensions(self) -> dict[int, int]:
        """The dimension of the tokens of each value that is cut, by its index."""
        return {index: extent.dimension for index, extent in self.cut.items()}

    def extent_of_all(self, value: Value) -> Extent | None:
        """Where all tokens lie in a value of the run."""
        extent = self.axis.extent(value)
        return None if extent is None or extent.missing else extent

    def local_numbers(self, call: FunctionCall) -> dict[Path, TracedInt]:
        """The integers among a call's arguments that depend on how many tokens a rank has."""
        return {
            path: number
            for path, number in integers_of(call).items()
            if isinstance(number, TracedInt) and self._is_local(number)
        }

    def _is_local(self, number: TracedInt) -> bool:
        return self.is_of_constants(number) or any(
            isinstance(origin, Size) and self._dimension(origin.value_index) == origin.dimension
            for origin in origins(number.expression)
        )

    def is_of_constants(self, number: TracedInt) -> bool:
        """Whether a number depends on the size of what is the same for each token."""
        return any(
            isinstance(origin, Size)
            and origin.dimension in self.axis.alike_dimensions(self.trace.values[origin.value_index])
            for origin in origins(number.expression)
        )

    def _dimension(self, index: int) -> int | None:
        """The dimension of a value along which it is cut."""
        return self.cut[index].dimension if index in self.cut else None

    def counts_tokens(self, number: TracedInt) -> bool:
        """Whether one token more makes a number one more."""
        sources = (one for one in origins(number.expression) if isinstance(one, Size))
        if any(self.cut[one.value_index].missing for one in sources if one.value_index in self.cut):
            return False
        sizes = sizes_in(number.expression, self.trace, self.axis, self.dimensions)
        length = self.axis.length
        first = number_at(number.expression, sizes, 100, length)
        return first is not None and all(
            number_at(number.expression, sizes, tokens, length) == first + tokens - 100
            for tokens in (101, 107, 1000)
        )
