"""What users are told without asking."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import colrow
from tests.pool import Pool, worker_mesh

WIDTH, EXPERTS = 6, 3


class Mixed(nn.Module):
    """A feed-forward block; a table of ``rows`` that stays whole, and experts in a loop, if asked for."""

    def __init__(self, rows: int, routed: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 400), nn.Linear(400, WIDTH)
        self.table = nn.Parameter(torch.rand(rows, WIDTH))
        self.routed = routed

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.down(self.up(x).tanh()) + self.table.cumsum(0).softmax(0).softmax(1)[-1]
        if self.routed and (h.argmax(-1) == 1).any():
            h = h + x
        return h


def _told(size: int, rows: int, routed: bool, planned: bool) -> list[tuple[str, str]]:
    example = {"x": torch.rand(4, WIDTH)}
    model = Mixed(rows, routed)
    shown = (
        colrow.derive_plan(model, {"training": colrow.trace.Example((), example)}, size)
        if planned
        else example
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        colrow.parallelize(model, worker_mesh(size), shown)
    return [
        (str(one.message), one.filename) for one in caught if issubclass(one.category, colrow.PlanWarning)
    ]


@pytest.mark.parametrize("size", [1, 2])
def test_rank_0_is_told_once(ranks: Callable[[int], Pool], size: int) -> None:
    pool = ranks(size)
    first, *others = pool.run(_told, size, 20, True, False)
    assert not any(others)
    if size == 1:
        assert not first
        return
    ((text, file),) = first
    assert file == __file__
    assert text.startswith("2% of the parameters stay whole on every rank (table, down.bias)")
    assert "1 guess of what the program reads" in text
    assert "colrow.state_of(model).plan.explain()" in text
    for rows, routed, planned in ((1, False, False), (20, True, True)):
        assert not any(pool.run(_told, size, rows, routed, planned))
    ((text, _),) = pool.run(_told, size, 1, True, False)[0]
    assert text.startswith("the plan rests on 1 guess")
