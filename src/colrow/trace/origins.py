"""What numbers that a trace does not have follow from: whether the program's course may be guessed.

A program that asks which experts were chosen takes one of many courses, all of which are alike: experts have
the same shapes, and each gets some tokens. Its answers are guessed. A program that asks how large its hidden
states are, and computes something else if they are large, has courses of which only one would be seen: that
is refused. What tells the two apart is what the number that is asked for was computed from.
"""

from __future__ import annotations

from enum import IntEnum
from math import isfinite
from typing import Any

import torch

from colrow.trace.content import reads_data
from colrow.trace.records import Value
from colrow.trace.values import ValueTable


class Origin(IntEnum):
    """What a tensor's numbers follow from; of several, the last named here counts.

    Attributes:
        KNOWN: constants and inputs whose numbers are known.
        CHANCE: random draws alone, as whether a layer is dropped.
        FINITE: whether numbers are finite: all are taken to be.
        STATE: buffers, as flags of what has been initialised.
        CHOICE: an order of data, as which experts have the highest scores.
        MARKED: data with zeros where a choice put them, as the weights of chosen experts.
        RANKED: the highest or lowest of data, as the least score that is chosen.
        DATA: anything else: weights, inputs without data, and what is computed from them.
    """

    KNOWN = 0
    CHANCE = 1
    FINITE = 2
    STATE = 3
    CHOICE = 4
    MARKED = 5
    RANKED = 6
    DATA = 7

    @property
    def is_guessed(self) -> bool:
        """Whether a program that reads such numbers may go on with made-up ones."""
        return self <= Origin.CHOICE


REASONS = {
    Origin.CHANCE: "it is drawn by chance",
    Origin.FINITE: "all numbers are taken to be finite",
    Origin.STATE: "it follows from buffers, which may change",
    Origin.CHOICE: "it follows from a choice by data, as of experts",
}
"""Why it is guessed, for people."""

_SHAPES = frozenset(
    ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
)
"""Operators that read shapes only."""
_DRAWS = frozenset(("rand_like", "randn_like", "randint_like"))
_POSITIONS = frozenset(("argsort", "argmax", "argmin"))
"""Operators that give positions of data in its order."""
_ORDERS = frozenset(("topk", "sort", "kthvalue", "max", "min", "median", "mode"))
"""Operators that give, if they have two results, what stands somewhere in its order, and where."""
_RANKS = frozenset(("topk", "sort", "kthvalue"))
"""Those of which it matters which place in the order it is."""
_NON_FINITE = frozenset(("isnan", "isinf", "isposinf", "isneginf", "isfinite"))
_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
_MARKS = frozenset(("scatter", "masked_fill", "where", "mul"))
"""Operators that put zeros, or other numbers, where a choice says."""
_TRUTHS = frozenset(("logical_not", "nonzero", "count_nonzero", "any", "all"))
"""Operators that read of numbers whether they are zero."""


class Origins:
    """Finds out what the values of a trace follow from, as they come to be."""

    def __init__(self, table: ValueTable) -> None:
        self._table = table
        self._known: dict[int, Origin] = {}  # by index; of values that operators gave

    def of(self, value: Value) -> Origin:
        """What a value's present content follows from."""
        if value.content is not None:
            return Origin.KNOWN
        if value.source.kind == "buffer":
            return self._known.get(value.index, Origin.STATE)
        return self._known.get(value.index, Origin.DATA)

    def copy(self, original: Value, value: Value) -> None:
        """A value of a copied layer follows from the same."""
        self._known[value.index] = self.of(original)

    def read(self, buffer: Value) -> None:
        """The program reads a buffer as an attribute: whatever it holds by now is a module's state."""
        if self.of(buffer) is Origin.DATA:
            self._known[buffer.index] = Origin.STATE

    def results(
        self,
        function: torch._ops.OpOverload,
        arguments: tuple[Any, ...],
        inputs: tuple[Value, ...],
        dtypes: list[torch.dtype],
    ) -> list[Origin]:
        """What an operator's results follow from.

        Args:
            arguments: as given; tensors or values are not looked at.
            dtypes: of the results.
        """
        name = function._schema.name.removeprefix("aten::").rstrip("_")
        given = [self.of(value) for value in inputs]
        found = max(given, default=Origin.KNOWN)
        if found is not Origin.KNOWN and name in _POSITIONS:
            found = Origin.CHOICE
        elif found is not Origin.KNOWN and name in _ORDERS and len(dtypes) == 2:
            return [min(found, Origin.RANKED) if name in _RANKS else found, Origin.CHOICE]
        elif name in _SHAPES:
            found = Origin.KNOWN
        elif name in _DRAWS:
            found = Origin.CHANCE
        elif torch.Tag.nondeterministic_seeded in function.tags:
            found = Origin.CHOICE if name == "multinomial" else max(found, Origin.CHANCE)
        elif found > Origin.CHOICE:
            numbers = [one for one in arguments if isinstance(one, int | float)]
            if name in _NON_FINITE or (name in _COMPARISONS and _asks_for_finite(inputs, numbers)):
                found = Origin.FINITE
            elif name in _COMPARISONS:
                found = Origin.CHOICE if _asks_for_choice(given, found, numbers) else Origin.DATA
            elif name in _MARKS and any(one in (Origin.CHOICE, Origin.MARKED) for one in given):
                found = Origin.MARKED
            elif found is Origin.MARKED and (
                name in _TRUTHS or (name == "_to_copy" and not _is_real(dtypes[0]))
            ):
                # what is truncated to integers is of other numbers, zeros excepted
                found = Origin.CHOICE
        return [found] * len(dtypes)

    def record(self, value: Value, origin: Origin, written: bool) -> None:
        """An operator gave a value, or wrote into it and with it into all that share its memory."""
        for one in self._table.aliases(value) if written else (value,):
            # what it wrote over may be there still
            self._known[one.index] = max(origin, self._known.get(one.index, origin)) if written else origin


def selects(function: torch._ops.OpOverload) -> bool:
    """Whether an operator picks some elements: how many is unknown, the program's course is the same."""
    return reads_data(function) and torch.Tag.dynamic_output_shape in function.tags


def _asks_for_finite(inputs: tuple[Value, ...], numbers: list[float]) -> bool:
    """Whether a number is compared with itself, or with infinity."""
    if len(inputs) == 2:
        return inputs[0] is inputs[1]
    return bool(numbers) and not isfinite(numbers[0])


def _asks_for_choice(given: list[Origin], found: Origin, numbers: list[float]) -> bool:
    """Whether data is compared with the ends of its own order, or with the zeros that a choice has put."""
    if found is Origin.MARKED:
        return bool(numbers) and numbers[0] == 0
    return len(given) == 2 and Origin.RANKED in given and min(given) > Origin.CHOICE


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
