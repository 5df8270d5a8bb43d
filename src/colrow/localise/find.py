"""All numbers of a traced program that must become a rank's.

Where every use of a module's integer asks for the same local number, the integer itself is changed; then the
module costs nothing at run time. What cannot be done so is changed at the call that needs it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn

from colrow.localise.arguments import integers_of
from colrow.localise.attributes import Attributes, Key
from colrow.localise.solve import Number, Solver
from colrow.localise.trial import Trials
from colrow.plan.exits import Reductions
from colrow.plan.plan import LocalAttribute, LocalInteger
from colrow.plan.selection import CannotPlaceError
from colrow.plan.sites import Sites, Where
from colrow.plan.states import States
from colrow.trace.integers import COMPARISON, Attribute, Size, TracedInt, origins
from colrow.trace.records import Escape, FunctionCall
from colrow.trace.tree import Path


@dataclass(frozen=True)
class Localisation:
    """The numbers that become local.

    Attributes:
        attributes: integers of modules.
        integers: integers in calls.
    """

    attributes: tuple[LocalAttribute, ...] = ()
    integers: tuple[LocalInteger, ...] = ()


@dataclass
class _Solutions:
    """Numbers by call and rank."""

    of: dict[int, list[dict[Path, Number]]] = field(default_factory=dict)

    def needed(self, call: FunctionCall) -> bool:
        return any(self.of.get(call.index, ()))


def localise(model: nn.Module, states: States, reductions: Reductions) -> Localisation:
    """Find the numbers that must become local for what is cut.

    Raises:
        CannotPlaceError: if a call gives the right parts with no numbers that were tried, or if the program
            computes with the size of what becomes local.
    """
    return _Search(model, states, reductions).run()


class _Search:
    def __init__(self, model: nn.Module, states: States, reductions: Reductions) -> None:
        self._states, self._selection = states, states.selection
        self._trace = states.selection.trace
        self._trials = Trials(states, reductions)
        self._solver = Solver(self._trials, self._trace.values)
        self._ranks = range(self._selection.ranks)
        self._concerned = [call for call in self._trace.calls if self._trials.concerns(call)]
        self._solutions = _Solutions()
        self._attributes = Attributes(model, self._trace, self._solver, self._concerned, self._ranks)

    def run(self) -> Localisation:
        if not self._selection.chosen:
            return Localisation()
        self._refuse_numeric_uses()
        self._refuse_sizes_elsewhere()
        for call in self._concerned:
            if any(abs(number) > 1 for number in integers_of(call).values()):
                self._solve(call)
        lifted, covered = self._lift()
        self._refuse_flips()
        integers = self._integers([call for call in self._concerned if call.index not in covered])
        return Localisation(tuple(lifted), tuple(integers))

    def _refuse_numeric_uses(self) -> None:
        for escape in self._trace.escapes:
            if escape.use == COMPARISON:
                continue
            for rank in self._ranks:
                local = self._solver.on_rank(escape.expression, rank, {}, sliced=True)
                if local != escape.expression.value:
                    raise self._refusal("the program computes with a size that would become local", escape)

    def _refuse_sizes_elsewhere(self) -> None:
        """A size that becomes local may not be given to what deals with whole values, as an index is."""
        concerned = {call.index for call in self._concerned}
        for call in self._trace.calls:
            if call.index in concerned or not integers_of(call):
                continue
            for rank in self._ranks:
                given = self._solver.given(call, rank, {})
                if given:
                    operation = self._trace.operations[call.first]
                    raise self._selection.cannot(
                        "a size that would become local is given to what deals with whole values", operation
                    )

    def _flips(self, escape: Escape) -> bool:
        """Whether a comparison has another outcome with what has been decided so far."""
        if escape.use != COMPARISON:
            return False
        path = escape.module.path if escape.module is not None else ""
        return any(
            self._solver.on_rank(escape.expression, rank, self._attributes.seen_by(path, rank), sliced=True)
            != escape.expression.value
            for rank in self._ranks
        )

    def _refuse_flips(self) -> None:
        for escape in self._trace.escapes:
            if self._flips(escape):
                raise self._refusal("the program would decide otherwise on a part", escape)

    def _refusal(self, text: str, escape: Escape) -> CannotPlaceError:
        values = [
            self._trace.values[origin.value_index]
            for origin in origins(escape.expression)
            if isinstance(origin, Size)
        ]
        return self._selection.cannot(f"{text}: {escape}", *values)

    def _solve(self, call: FunctionCall) -> None:
        found = []
        for rank in self._ranks:
            numbers = self._solver.solve(call, rank)
            if numbers is None:
                operation = self._trace.operations[call.first]
                raise self._selection.cannot("no numbers were found with which it gives a part", operation)
            found.append(numbers)
        if any(found):
            self._solutions.of[call.index] = found

    # ---------------------------------------------------------------- attributes

    def _lift(self) -> tuple[list[LocalAttribute], set[int]]:
        """Attributes to change, and the calls that are right then."""
        by_module: dict[str, list[FunctionCall]] = defaultdict(list)
        flips: dict[str, list[Escape]] = defaultdict(list)
        for call in self._concerned:
            if self._solutions.needed(call):
                by_module[call.module.path].append(call)
        for escape in self._trace.escapes:
            if self._flips(escape):
                flips[escape.module.path if escape.module is not None else ""].append(escape)
        found: list[LocalAttribute] = []
        covered: set[int] = set()
        for path in dict.fromkeys([*by_module, *flips]):
            calls = [call for call in by_module[path] if call.index not in covered]
            mine = [escape for escape in flips[path] if self._flips(escape)]
            keys = self._keys(calls, mine)
            if not keys:
                continue
            solution = self._attributes.solve(path, calls, mine, keys, self._solutions.of)
            if solution is not None:
                attributes, right = solution
                found += attributes
                covered |= right
        return found, covered

    def _keys(self, calls: list[FunctionCall], flips: list[Escape]) -> list[Key]:
        """The attributes that the integers which must change, or comparisons, are made of."""
        expressions = [escape.expression for escape in flips]
        for call in calls:
            integers = integers_of(call)
            for path in {path for numbers in self._solutions.of[call.index] for path in numbers}:
                number = integers[path]
                if isinstance(number, TracedInt):
                    expressions.append(number.expression)
        keys: dict[Key, None] = {}
        for expression in expressions:
            for origin in origins(expression):
                if isinstance(origin, Attribute):
                    keys[(origin.module, origin.path)] = None
        return list(keys)

    # ---------------------------------------------------------------- calls

    def _integers(self, calls: list[FunctionCall]) -> list[LocalInteger]:
        sites = Sites(self._selection)
        acting: dict[tuple[object, ...], list[tuple[Where, FunctionCall]]] = defaultdict(list)
        for call in calls:
            paths = {path for numbers in self._solutions.of.get(call.index, ()) for path in numbers}
            for path in paths:
                where = Where(call.module, path, False, call)
                acting[(where.key, self._numbers(call, path))].append((where, call))
        found: list[LocalInteger] = []
        for group in acting.values():
            given, numbers = self._numbers(group[0][1], group[0][0].path)
            for place in sites.passes([where for where, _ in group]):
                found.append(LocalInteger(place, given, numbers))
        return found

    def _numbers(self, call: FunctionCall, path: Path) -> tuple[tuple[int, ...], tuple[Number, ...]]:
        """What the program gives on each rank, and what it should."""
        integers = {each: int(number) for each, number in integers_of(call).items()}
        given, numbers = [], []
        for rank in self._ranks:
            mine = self._solver.given(call, rank, self._attributes.environment(call, rank))
            given.append(mine.get(path, integers[path]))
            numbers.append(self._solutions.of[call.index][rank].get(path, given[-1]))
        return tuple(given), tuple(numbers)
