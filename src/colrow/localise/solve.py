"""Which integers of a call must change for a rank, and to what: by trial."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TypeAlias

from colrow.localise.arguments import integers_of, values_of
from colrow.localise.trial import Trials
from colrow.trace.integers import Attribute, Expression, Size, TracedInt, evaluate
from colrow.trace.records import FunctionCall, Value
from colrow.trace.tree import Path

Number: TypeAlias = "int | tuple[int, ...]"
Environment: TypeAlias = Mapping[tuple[str, str], int]
"""Numbers that attributes have on a rank, by module and path; others are as in the original."""

#: Combinations of integers that are tried before a call is given up.
TRIALS = 400

#: Values considered for one integer.
_CANDIDATES = 5


class Solver:
    """Finds numbers for calls; a rank at a time."""

    def __init__(self, trials: Trials, values: list[Value]) -> None:
        self._trials, self._values = trials, values

    def on_rank(
        self, expression: Expression, rank: int, environment: Environment, *, sliced: bool = False
    ) -> int:
        """What an expression of sizes and attributes is on a rank, by itself.

        Args:
            sliced: take values that are sliced somewhere as parts.
        """

        def number(origin: Attribute | Size) -> int:
            if isinstance(origin, Attribute):
                return environment.get((origin.module, origin.path), origin.value)
            value = self._values[origin.value_index]
            return self._trials.local_size(value, origin.dimension, rank, sliced=sliced)

        return evaluate(expression, number)

    def given(self, call: FunctionCall, rank: int, environment: Environment) -> dict[Path, int]:
        """The integers that the program gives ``call`` on a rank, where they differ from the original's."""
        found: dict[Path, int] = {}
        for path, number in integers_of(call).items():
            if isinstance(number, TracedInt):
                try:
                    local = self.on_rank(number.expression, rank, environment)
                except ZeroDivisionError:
                    local = int(number)
                if local != int(number):
                    found[path] = local
        return found

    def works(self, call: FunctionCall, rank: int, environment: Environment) -> bool:
        """Whether a call is right on a rank as the program makes it."""
        return self._trials.works(call, rank, self.given(call, rank, environment))

    def solve(self, call: FunctionCall, rank: int) -> dict[Path, Number] | None:
        """Integers that a call must have where the program gives it others; ``None`` if there are none."""
        given = self.given(call, rank, {})
        if self._trials.works(call, rank, given):
            return {}
        integers = {path: int(number) for path, number in integers_of(call).items()}
        for attempt in self._attempts(call, rank, integers):
            if self._trials.works(call, rank, attempt):
                return {
                    path: number
                    for path, number in {**integers, **attempt}.items()
                    if number != given.get(path, integers[path])
                }
        return None

    def _attempts(self, call: FunctionCall, rank: int, integers: dict[Path, int]) -> list[dict[Path, Number]]:
        """Changes of integers, fewest first: equal numbers alike, each by itself; then lists of sizes."""
        choices = {number: self._candidates(call, rank, number) for number in set(integers.values())}
        attempts: list[dict[Path, Number]] = [{}]
        several = [number for number in choices if len(choices[number]) > 1]
        for combination in _combinations([choices[number] for number in several]):
            changes = dict(zip(several, combination, strict=True))
            attempts.append(
                {
                    path: changes[number]
                    for path, number in integers.items()
                    if changes.get(number, number) != number
                }
            )
        open_paths = [path for path, number in integers.items() if len(choices[number]) > 1]
        if len(open_paths) <= 6:
            for combination in _combinations([choices[integers[path]] for path in open_paths]):
                attempts.append(
                    {
                        path: number
                        for path, number in zip(open_paths, combination, strict=True)
                        if number != integers[path]
                    }
                )
        attempts.sort(key=len)
        return attempts[:TRIALS] + self._lists(call, rank, integers)

    def _lists(self, call: FunctionCall, rank: int, integers: dict[Path, int]) -> list[dict[Path, Number]]:
        """The size of equal pieces replaced by the sizes of all pieces, of which only some may be cut."""
        pieces = values_of(call.outputs)
        if not isinstance(call.outputs, tuple | list) or len(pieces) < 2:
            return []
        found: list[dict[Path, Number]] = []
        for dimension in range(min(len(piece.shape) for piece in pieces)):
            sizes = tuple(self._result_size(call, piece, dimension, rank) for piece in pieces)
            found += [{path: sizes} for path, number in integers.items() if number > 1]
        return found

    def _result_size(self, call: FunctionCall, value: Value, dimension: int, rank: int) -> int:
        kept = self._trials.indices(value, dimension, rank)
        is_part = self._trials.is_part(value, call, True)
        return value.shape[dimension] if kept is None or not is_part else len(kept)

    def _candidates(self, call: FunctionCall, rank: int, number: int) -> list[int]:
        """What an integer might have to be: itself, or as much of a cut dimension as remains of it.

        Sizes first; then shares, as of the number of groups into which a dimension is divided.
        """
        sizes, shares = [number], []
        size, sign = abs(number), 1 if number > 0 else -1
        for value in values_of((call.arguments, call.keywords, call.outputs)):
            for dimension, extent in enumerate(value.shape):
                if not 1 < size <= extent:
                    continue
                kept = self._trials.indices(value, dimension, rank)
                if kept is not None:
                    sizes.append(sign * int((kept < size).sum()))
                    share, rest = divmod(size * len(kept), extent)
                    shares += [] if rest else [sign * share]
        return list(dict.fromkeys(sizes + shares))[:_CANDIDATES]


def _combinations(choices: list[list[int]]) -> list[tuple[int, ...]]:
    count = 1
    for options in choices:
        count *= len(options)
    return [] if count > 16 * TRIALS else list(product(*choices))
