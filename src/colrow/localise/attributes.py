"""Integers of modules that can be changed themselves, because every use of them asks for the same number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any, TypeAlias

from torch import nn

from colrow.localise.arguments import integers_of
from colrow.localise.solve import Number, Solver
from colrow.plan.plan import LocalAttribute
from colrow.trace.integers import COMPARISON, Arithmetic, Attribute, Expression, TracedInt, origins
from colrow.trace.records import Escape, FunctionCall, Trace
from colrow.trace.tree import Path

Key: TypeAlias = tuple[str, str]
"""An attribute as a trace names it: the module that it was found at, and its path from there."""

#: Attributes of one module that are changed together.
_TOGETHER = 3

#: Attributes of one module that are considered.
_CONSIDERED = 6

#: Local numbers that are considered for one attribute.
_OPTIONS = 4


class Attributes:
    """Which attributes can be changed; remembers what was decided."""

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        solver: Solver,
        concerned: Sequence[FunctionCall],
        ranks: range,
    ) -> None:
        self._model, self._solver, self._ranks = model, solver, ranks
        self._concerned = {call.index for call in concerned}
        self._escapes = trace.escapes
        self._users: dict[Key, list[FunctionCall]] = defaultdict(list)
        self._origins: dict[Key, list[Attribute]] = defaultdict(list)
        for call in trace.calls:
            keys: dict[Key, None] = {}
            for number in integers_of(call).values():
                if isinstance(number, TracedInt):
                    keys |= dict.fromkeys(self._note(number.expression))
            for key in keys:
                self._users[key].append(call)
        for escape in trace.escapes:
            self._note(escape.expression)
        self._decided: dict[str, list[dict[Key, int]]] = {}

    def _note(self, expression: Expression) -> list[Key]:
        """Remember the attributes of an expression; their names."""
        keys = []
        for origin in origins(expression):
            if isinstance(origin, Attribute):
                keys.append((origin.module, origin.path))
                self._origins[keys[-1]][:] = [origin]
        return keys

    def environment(self, call: FunctionCall, rank: int) -> dict[Key, int]:
        """The attributes that a call's module has changed on a rank."""
        decided = self._decided.get(call.module.path)
        return {} if decided is None else decided[rank]

    def seen_by(self, path: str, rank: int) -> dict[Key, int]:
        """All changed attributes that code of the module at ``path`` may read, on a rank."""
        seen: dict[Key, int] = {}
        for owner, decided in self._decided.items():
            for key, number in decided[rank].items():
                if owner == path or "." not in key[1]:
                    seen[key] = number
        return seen

    def solve(
        self,
        path: str,
        calls: Sequence[FunctionCall],
        flips: Sequence[Escape],
        keys: Sequence[Key],
        solutions: Mapping[int, list[dict[Path, Number]]],
    ) -> tuple[list[LocalAttribute], set[int]] | None:
        """Attributes for the module at ``path`` with which ``calls`` and comparisons are right, if any.

        Returns:
            The attributes, and the calls that are right with them.
        """
        keys = self._with_companions(path, keys)
        names = {key: self._name_at(path, key) for key in keys}
        reachable = [key for key in keys if names[key] is not None]
        for count in range(1, min(_TOGETHER, len(reachable)) + 1):
            for subset in combinations(reachable, count):
                found = [self._numbers(path, calls, flips, subset, rank, solutions) for rank in self._ranks]
                if all(numbers is not None for numbers in found):
                    environments = [numbers for numbers in found if numbers is not None]
                    self._decided[path] = environments
                    attributes = []
                    for key in subset:
                        holder, name = names[key] or ("", "")
                        values = tuple(numbers[key] for numbers in environments)
                        attributes.append(LocalAttribute(holder, name, values))
                    right = {call.index for key in subset for call in self._uses(path, key)}
                    return attributes, right | {call.index for call in calls}
        return None

    def _with_companions(self, path: str, keys: Sequence[Key]) -> list[Key]:
        """The attributes, and those that stand in one expression with them."""
        found = dict.fromkeys(keys)
        for key in keys:
            for call in self._uses(path, key):
                for number in integers_of(call).values():
                    if isinstance(number, TracedInt) and key in _keys(number.expression):
                        found |= dict.fromkeys(_keys(number.expression))
        return list(found)[:_CONSIDERED]

    def _numbers(
        self,
        path: str,
        calls: Sequence[FunctionCall],
        flips: Sequence[Escape],
        subset: Sequence[Key],
        rank: int,
        solutions: Mapping[int, list[dict[Path, Number]]],
    ) -> dict[Key, int] | None:
        """Numbers for attributes on a rank with which all their uses are right."""
        options = [self._options(key, calls, flips, rank, solutions) for key in subset]
        users = {call.index: call for key in subset for call in self._uses(path, key)}
        users |= {call.index: call for call in calls}
        for numbers in product(*options):
            environment = dict(zip(subset, numbers, strict=True))
            if self._escapes_under(path, environment, rank):
                continue
            if any(
                self._solver.on_rank(one.expression, rank, environment) != one.expression.value
                for one in flips
            ):
                continue
            if all(self._right(call, rank, environment) for call in users.values()):
                return environment
        return None

    def _right(self, call: FunctionCall, rank: int, environment: dict[Key, int]) -> bool:
        if call.index in self._concerned:
            return self._solver.works(call, rank, environment)
        # what deals with whole values must not notice
        return self._solver.given(call, rank, environment) == self._solver.given(call, rank, {})

    def _escapes_under(self, path: str, environment: dict[Key, int], rank: int) -> bool:
        """Whether the module computes with a number that would change."""
        for escape in self._escapes:
            own = escape.module is not None and escape.module.path == path
            keys = set(_keys(escape.expression)) & set(environment)
            if keys and (own or any(key[0] == path for key in keys)):
                local = self._solver.on_rank(escape.expression, rank, environment)
                if escape.use == COMPARISON:
                    before = escape.expression.value
                    if local != before == self._solver.on_rank(escape.expression, rank, {}):
                        return True
                elif local != self._solver.on_rank(escape.expression, rank, {}):
                    return True
        return False

    def _options(
        self,
        key: Key,
        calls: Sequence[FunctionCall],
        flips: Sequence[Escape],
        rank: int,
        solutions: Mapping[int, list[dict[Path, Number]]],
    ) -> list[int]:
        """Local numbers for an attribute, from the numbers that calls need."""
        found: dict[int, None] = {}
        ratios: dict[tuple[int, int], None] = {}
        for call in calls:
            integers = integers_of(call)
            for place, wanted in solutions[call.index][rank].items():
                number = integers[place]
                if isinstance(number, TracedInt) and isinstance(wanted, int) and number:
                    self._scale(found, key, number.expression, int(number), wanted)
                    ratios[int(number), wanted] = None
        for escape in flips:
            compared = escape.expression
            assert isinstance(compared, Arithmetic)
            for one, other in ((compared.left, compared.right), (compared.right, compared.left)):
                if one.value and one.value == other.value:
                    self._scale(found, key, one, one.value, self._solver.on_rank(other, rank, {}))
        original = next((one.value for one in self._origins[key]), None)
        if original is not None:
            if not found:
                # another attribute may have to shrink with the one that asks for it
                for number, wanted in ratios:
                    exact, rest = divmod(original * wanted, number)
                    if not rest:
                        found[exact] = None
            if not ratios:
                found[original] = None  # this rank has as much as the original
        return list(found)[:_OPTIONS]

    @staticmethod
    def _scale(found: dict[int, None], key: Key, expression: Expression, number: int, wanted: int) -> None:
        """Note what an attribute would be if its expression were ``wanted`` rather than ``number``."""
        for origin in origins(expression):
            if isinstance(origin, Attribute) and (origin.module, origin.path) == key:
                exact, rest = divmod(origin.value * wanted, number)
                if not rest:
                    found[exact] = None

    # ---------------------------------------------------------------- whose attribute

    def _uses(self, path: str, key: Key) -> list[FunctionCall]:
        """The calls that see the attribute when it is changed for the module at ``path``."""
        if key[0] == path and "." not in key[1]:
            return self._users[key]
        return [call for call in self._users[key] if call.module.path == path]

    def _name_at(self, path: str, key: Key) -> tuple[str, str] | None:
        """How the module at ``path`` calls an attribute: its own, or one of an object that it holds."""
        owner, name = key
        if "." not in name:
            # another module's attribute is changed there, for all who read it
            return (owner, name)
        if not path:
            return None  # what the model itself holds, its configuration, is saved with it
        *steps, last = name.split(".")
        holder = _follow(self._model.get_submodule(owner), steps)
        if holder is None or isinstance(holder, dict | list | tuple):
            return None
        for attribute, item in vars(self._model.get_submodule(path)).items():
            if item is holder:
                return (path, f"{attribute}.{last}")
        return None


def _follow(item: Any, steps: Sequence[str]) -> Any:
    for step in steps:
        item = item.get(step) if isinstance(item, dict) else getattr(item, step, None)
    return item


def _keys(expression: Expression) -> list[Key]:
    return [(origin.module, origin.path) for origin in origins(expression) if isinstance(origin, Attribute)]
