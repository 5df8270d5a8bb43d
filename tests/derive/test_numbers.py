"""Integers that become local: which ones, and what they have to be on a rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.derive.equal import run
from tests.pool import Pool

WIDTH = 12


class Packed(nn.Module):
    """Three parts of one projection, which are taken at places that the program's text fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 24)
        self.out = nn.Linear(4, WIDTH)


class ComplexParts(Packed):
    """The middle slice ends within what a rank has, at the wrong place: only its content is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.view_as_complex(self.into(x).unflatten(-1, (12, 2)))
        first, middle, last = parts[..., :4], parts[..., 4:8], parts[..., -4:]
        result: Tensor = self.out((first * middle + last * middle.conj()).real)
        return result


class IntegerParts(Packed):
    """The same, of numbers that were counted."""

    def forward(self, x: Tensor) -> Tensor:
        values = self.into(x).unflatten(-1, (12, 2))
        largest = values.argmax(-1)
        first, middle, last = largest[..., :4], largest[..., 4:8], largest[..., -4:]
        weights = first + 2 * middle + 4 * last + 1
        result: Tensor = self.out(values[..., 4:8, 0] * weights)
        return result


class Groups(nn.Module):
    """Each group of features is normalised by itself, and only a part of the groups is on a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 20)
        self.norm = nn.GroupNorm(5, 20)
        self.out = nn.Linear(20, WIDTH)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.norm(self.into(x).transpose(1, 2)).transpose(1, 2))
        return result


def _equal(build: Callable[[], nn.Module], size: int) -> set[str]:
    return set(run(build, size).parameters)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("build", [ComplexParts, IntegerParts, Groups])
def test_parts_are_found_by_their_content(
    ranks: Callable[[int], Pool], build: Callable[[], nn.Module], size: int
) -> None:
    cut = ranks(size).run(_equal, build, size, timeout=120)[0]
    assert {"into.weight", "into.bias", "out.weight"} <= cut
