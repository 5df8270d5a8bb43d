"""Plausible content for what follows from weights: as if tokens were routed evenly.

A program that asks how many tokens each expert gets, and then cuts the sorted tokens accordingly, needs
numbers that fit together. They are computed, as the program does, from scores that are made up: the scores
are those in which each row prefers columns of its own, so that the choices spread over all columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from colrow.trace.content import LARGEST
from colrow.trace.records import Operation, Value
from colrow.trace.tree import map_leaves, tensors_of

_DEPTH = 200
"""Operators between made-up scores and what the program reads."""
_FEW = 16
"""Columns up to which each is some row's first choice."""
_FRONTIERS = frozenset(
    f"aten.{name}"
    for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "convolution", "_grouped_mm", "native_dropout")
)
"""Operators whose results are made up rather than computed."""


class Imagination:
    """Remembers what it has made up, so that all of it fits together."""

    def __init__(self) -> None:
        self._contents: dict[int, Tensor] = {}

    def content_of(self, value: Value, depth: int = 0) -> Tensor:
        """Known content, or made up: a tensor of the value's shape and type on the CPU."""
        if value.content is not None:
            return value.content
        if value.index not in self._contents:
            found = None if depth > _DEPTH else self._computed(value, depth)
            self._contents[value.index] = _scores(value) if found is None else found
        return self._contents[value.index]

    def remember(self, value: Value, content: Tensor) -> None:
        """What was made up for a value elsewhere."""
        self._contents[value.index] = content

    def compute(self, function: torch._ops.OpOverload, arguments: Any, keywords: Any, depth: int = 0) -> Any:
        """The operator's result on made-up content; None if it has none.

        Args:
            arguments, keywords: with values in place of tensors.
        """

        def change(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return self.content_of(leaf, depth + 1).clone()
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        given = map_leaves((arguments, keywords), change)
        try:
            with torch.no_grad():
                return function(*given[0], **given[1])
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None

    def _computed(self, value: Value, depth: int) -> Tensor | None:
        """The content as its producer, and whatever wrote into it since, would give it."""
        operation = value.producer
        if operation is None or operation.name in _FRONTIERS or math.prod(value.shape) > LARGEST:
            return None
        if torch.Tag.nondeterministic_seeded in operation.function.tags:
            return None
        found = self._result(operation, value, depth)
        writes = [use for use in value.uses if any(value is output for output in use.outputs)]
        for write in writes:
            if found is None:
                return None
            self._contents[value.index] = found
            found = self._result(write, value, depth)
        return found

    def _result(self, operation: Operation, value: Value, depth: int) -> Tensor | None:
        results = tensors_of(self.compute(operation.function, operation.arguments, operation.keywords, depth))
        for output, result in zip(operation.outputs, results, strict=False):
            if output is value and result.shape == value.shape:
                return result
        return None


def _scores(value: Value) -> Tensor:
    """Scores in which row i prefers columns of its own; of weights ones, which tell no column from another.

    With few columns the rows begin one after the other. With many they begin at the first or at the last one
    in turn: a loop over a hundred experts is seen at both ends, where those that differ are, and no longer
    than needed. A single number is a half: what a draw from [0, 1) is on average, so that where one decides
    which layers to drop none is.
    """
    if not value.dtype.is_floating_point:
        return torch.zeros(value.shape, dtype=value.dtype)
    if value.producer is None and value.source.kind in ("parameter", "buffer"):
        return torch.ones(value.shape, dtype=value.dtype)
    columns = value.shape[-1] if value.shape else 1
    rows = math.prod(value.shape[:-1])
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    if columns > _FEW:
        ranks = torch.where(row % 2 == 0, column, columns - 1 - column)
    else:
        ranks = (column - row * max(1, columns // max(1, rows))) % max(1, columns)
    return (0.5 - ranks / max(1, columns)).to(value.dtype).view(value.shape)
