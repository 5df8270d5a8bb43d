"""What hypothesis draws for the cases: sizes, tensors, numbers; and the table the cases are collected in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from colrow.layout.cut import Cut
from tests.axes.brute_force import Case

T = TypeVar("T")


class Draw:
    """Random sizes, tensors and choices of one example."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self._generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), label="seed"))

    def size(self, low: int = 2, high: int = 4) -> int:
        return self._data.draw(st.integers(low, high), label="size")

    def sizes(self, low: int = 1, high: int = 4) -> list[int]:
        return [self.size() for _ in range(self.size(low, high))]

    def choice(self, *options: T) -> T:
        return self._data.draw(st.sampled_from(options), label="choice")

    def flag(self) -> bool:
        return self._data.draw(st.booleans(), label="flag")

    def dimension(self, count: int) -> int:
        """A dimension of ``count``, counted from the front or from the end."""
        return self._data.draw(st.integers(-count, count - 1), label="dimension")

    def permutation(self, count: int) -> list[int]:
        return self._data.draw(st.permutations(range(count)), label="permutation")

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self._generator)

    def positive(self, *shape: int) -> Tensor:
        return self.tensor(*shape).abs() + 0.1

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self._generator)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator) < 0.5

    def cut(self, units: int) -> Cut:
        """A cut of ``units`` over two or three ranks, as uneven as may be, but no rank without any."""
        ranks = min(units, self.size(2, 3))
        bounds = self._data.draw(
            st.lists(st.integers(1, units - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True),
            label="cut",
        )
        return Cut((0, *sorted(bounds), units))


Builder: TypeAlias = Callable[[Draw, Any], Case]

#: builders of cases by ``aten.operator`` or ``aten.operator.overload``
CASES: dict[str, list[Builder]] = {}


def case(*names: str) -> Callable[[Builder], Builder]:
    """Decorator: a builder of cases for the operators ``names``."""

    def add(builder: Builder) -> Builder:
        for name in names:
            CASES.setdefault(name, []).append(builder)
        return builder

    return add


def overload(name: str) -> torch._ops.OpOverload:
    """``aten.view`` or ``aten.sum.dim_IntList`` as an operator."""
    _, operator, *rest = name.split(".")
    return getattr(getattr(torch.ops.aten, operator), rest[0] if rest else "default")
