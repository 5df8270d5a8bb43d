"""What a rule sees: one operation, its arguments by name, and the factors of its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from colrow.axes.factor import Factor, Reason
from colrow.axes.factors import Factors
from colrow.trace.records import Operation, Value

Dimensions: TypeAlias = tuple[Factor, ...]
ByOperation: TypeAlias = dict[int, list[Factor]]


@dataclass
class Marks:
    """What operators do with factors besides keeping them; factors by the index of the operation.

    Attributes:
        contracted: summed over: the results are partial sums.
        looked_up: the rows of a table in which the operator looks up: with only some of them, a rank's
            results are zero where the row is another's, and partial sums in all.
        iota: the content of the result depends on the index: made whole, then sliced.
        classes: the classes of a cross-entropy: a loss over cut classes is needed.
        blocked: must be whole, in the operator's view.
    """

    contracted: ByOperation = field(default_factory=lambda: defaultdict(list))
    looked_up: ByOperation = field(default_factory=lambda: defaultdict(list))
    iota: ByOperation = field(default_factory=lambda: defaultdict(list))
    classes: ByOperation = field(default_factory=lambda: defaultdict(list))
    blocked: ByOperation = field(default_factory=lambda: defaultdict(list))


class RuleContext:
    """One operation, for its rule.

    A rule reads :meth:`dimensions` of the inputs, ties them (:meth:`unify`), marks what happens to them
    (:meth:`contract`, :meth:`look_up`, :meth:`block`, ...) and calls :meth:`set_output` for every output.
    A factor that is neither blocked nor marked promises: with this factor cut on all tensors that carry it,
    the operator on a rank's parts gives that rank's parts of the result.

    Attributes:
        operation: the operation.
        factors: the arena, for what is not offered here.
    """

    def __init__(
        self,
        operation: Operation,
        factors: Factors,
        table: Callable[[Value], Dimensions],
        marks: Marks,
        results: dict[int, Dimensions],
    ) -> None:
        self.operation = operation
        self.factors = factors
        self._table = table
        self._marks = marks
        self._results = results
        self._reasons: dict[str, Reason] = {}
        schema = operation.function._schema.arguments
        self._arguments = {
            argument.name: operation.arguments[position]
            if position < len(operation.arguments)
            else operation.keywords.get(argument.name, argument.default_value)
            for position, argument in enumerate(schema)
        }

    # ---------------------------------------------------------------- reading

    @property
    def name(self) -> str:
        """The operator: ``aten.view``."""
        return self.operation.name

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.operation.inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.operation.outputs

    def argument(self, name: str, otherwise: Any = None) -> Any:
        """An argument by its name in the operator's schema, its default where it was not given."""
        found = self._arguments.get(name)
        return otherwise if found is None else found

    def value(self, name: str) -> Value:
        """An argument that must be a tensor.

        Raises:
            TypeError: if it is none.
        """
        found = self._arguments.get(name)
        if not isinstance(found, Value):
            raise TypeError(f"{self.name}: argument {name!r} is not a tensor")
        return found

    def optional(self, name: str) -> Value | None:
        """An argument that may be a tensor, a number or absent; None unless it is a tensor."""
        found = self._arguments.get(name)
        return found if isinstance(found, Value) else None

    def dimensions(self, value: Value | str) -> Dimensions:
        """The factors of an input, given as a value or by the argument's name."""
        return self._table(self.value(value) if isinstance(value, str) else value)

    # ---------------------------------------------------------------- tying

    def atom(self, size: int) -> Factor:
        """A new factor."""
        return self.factors.atom(int(size))

    def atoms(self, shape: Iterable[int]) -> list[Factor]:
        """New factors for all dimensions of ``shape``."""
        return [self.atom(size) for size in shape]

    def blocked_atom(self, size: int, text: str) -> Factor:
        """A new factor that must not be sharded."""
        factor = self.atom(size)
        self.block(factor, text)
        return factor

    def unify(self, first: Factor, second: Factor, text: str = "parts that do not match") -> None:
        """Make two factors the same, or block both."""
        self.factors.unify(first, second, self._reason(text))

    def split(self, factor: Factor, sizes: Sequence[int], text: str) -> list[Factor] | None:
        """The parts of a row-major product; None, and blocked, if it is no such product."""
        return self.factors.split(factor, [int(size) for size in sizes], self._reason(text))

    def cut(self, factor: Factor, offsets: Iterable[int], text: str) -> list[Factor] | None:
        """The pieces between offsets; None, and blocked, if it cannot be cut there."""
        return self.factors.cut(factor, [int(offset) for offset in offsets], self._reason(text))

    def segment(self, factor: Factor, start: int, stop: int, text: str) -> Factor:
        """The part of ``factor`` from ``start`` to ``stop``; if it cannot be cut there, a blocked atom."""
        start = min(max(int(start), 0), factor.size)
        stop = min(max(int(stop), start), factor.size)
        if start == stop:
            return self.atom(0)
        pieces = self.cut(factor, [start, stop], text)
        if pieces is None:
            return self.blocked_atom(stop - start, text)
        return pieces[0 if start == 0 else 1]

    def broadcast(self, values: Iterable[Value], shape: Sequence[int]) -> list[Factor]:
        """Tie ``values`` as they broadcast to ``shape``; the factors of a result of that shape."""
        found: list[Factor | None] = [None] * len(shape)
        for value in values:
            for back, factor in enumerate(reversed(self.dimensions(value)), start=1):
                if factor.size == 1 or back > len(shape):
                    continue
                known = found[-back]
                if known is None:
                    found[-back] = factor
                elif known is not factor:
                    self.unify(known, factor)
        return [
            factor if factor is not None and factor.size == size else self.atom(size)
            for factor, size in zip(found, shape, strict=True)
        ]

    # ---------------------------------------------------------------- marking

    def block(self, factor: Factor, text: str) -> None:
        """Forbid that ``factor`` be sharded, because of ``text``: ``softmax over it``."""
        self._marks.blocked[self.operation.index].append(factor)
        self.factors.block(factor, self._reason(text))

    def block_dimensions(self, value: Value | str, which: Iterable[int], text: str) -> None:
        """Block dimensions of an input; negative ones count from the end."""
        dimensions = self.dimensions(value)
        for dimension in which:
            if dimensions:
                self.block(dimensions[dimension], text)

    def block_all(self, text: str) -> None:
        """Block every dimension of every input, and of every output, which then needs not be set."""
        for value in self.inputs:
            self.block_dimensions(value, range(len(value.shape)), text)
        for index, value in enumerate(self.outputs):
            self.set_output([self.blocked_atom(size, text) for size in value.shape], index)

    def contract(self, factor: Factor) -> None:
        """The operator sums over ``factor``: with a part of it, the result is a partial sum."""
        self._marks.contracted[self.operation.index].append(factor)

    def look_up(self, factor: Factor) -> None:
        """``factor`` are the rows of a table that indices point into: see :attr:`Marks.looked_up`."""
        self._marks.looked_up[self.operation.index].append(factor)

    def iota(self, factor: Factor) -> None:
        """The content of the result depends on the index along ``factor``, as of ``arange``."""
        self._marks.iota[self.operation.index].append(factor)

    def classes(self, factor: Factor) -> None:
        """``factor`` are the classes of a cross-entropy: see :attr:`Marks.classes`."""
        self._marks.classes[self.operation.index].append(factor)

    def set_output(self, dimensions: Sequence[Factor], output: int = 0) -> None:
        """Set the factors of an output. If it is also an input (written in place), tie them instead.

        Raises:
            ValueError: if the factors do not have the sizes of the output.
        """
        value = self.outputs[output]
        sizes = tuple(factor.size for factor in dimensions)
        if sizes != tuple(value.shape):
            raise ValueError(
                f"the rule of {self.name} gave output {output} the sizes {list(sizes)}, "
                f"but its shape is {list(value.shape)}"
            )
        known = self._results.get(value.index)
        if known is None:
            self._results[value.index] = tuple(dimensions)
        else:
            for old, new in zip(known, dimensions, strict=True):
                self.unify(old, new)

    def set_same(self, value: Value | str) -> None:
        """Every output of the shape of ``value`` has its factors; others have new ones."""
        value = self.value(value) if isinstance(value, str) else value
        dimensions = self.dimensions(value)
        for index, output in enumerate(self.outputs):
            same = output.shape == value.shape
            self.set_output(dimensions if same else self.atoms(output.shape), index)

    def _reason(self, text: str) -> Reason:
        if text not in self._reasons:
            self._reasons[text] = Reason(text, self.operation)
        return self._reasons[text]


def positive(dimension: int, dimensions: int) -> int:
    """A dimension counted from the front: -1 of 3 is 2; any of none is 0."""
    return int(dimension) % dimensions if dimensions else 0
