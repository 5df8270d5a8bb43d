"""Arguments that do not fit: each error names the cause and what would fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from colrow.layout import Cut
from colrow.matmul import Grid, matmul
from tests.pool import Pool, worker_mesh


def _refused() -> dict[str, str]:
    mesh = worker_mesh(4)
    ranks = Grid(mesh).ranks
    a, b = torch.zeros(3, 4), torch.zeros(4, 2)
    cut = Cut.balanced
    pair = (cut(4, 4), cut(4, 1))
    calls: dict[str, Callable[[], object]] = {
        "split": lambda: matmul(a, b, mesh, "rows"),  # type: ignore[arg-type]
        "form": lambda: matmul(a, b, mesh, result="part"),  # type: ignore[arg-type]
        "vector": lambda: matmul(a, b[:, 0], mesh),
        "dtypes": lambda: matmul(a, b.double(), mesh),
        "bool": lambda: matmul(a.bool(), b.bool(), mesh),
        "inner column": lambda: matmul(a, b.t(), mesh),
        "inner row": lambda: matmul(a, b.t(), mesh, "row"),
        "inner 2d": lambda: matmul(a, b.t(), mesh, "2d"),
        "grid": lambda: matmul(a, b, mesh, "2d", grid=(2, 3)),
        "grid twice": lambda: matmul(a, b, Grid(mesh), "2d", grid=(1, 4)),
        "grid by columns": lambda: matmul(a, b, mesh, grid=(2, 2)),
        "grid as group": lambda: matmul(a, b, Grid(mesh), "row"),
        "panel by columns": lambda: matmul(a, b, mesh, panel=2),
        "panel": lambda: matmul(a, b, mesh, "2d", panel=0),
        "unknown": lambda: matmul(a, b, mesh, b_is="shard"),
        "shard of b": lambda: matmul(a, b, mesh, b_is="shard", columns=2),
        "shard of a": lambda: matmul(a, b, mesh, "row", a_is="shard"),
        "ranks of a cut": lambda: matmul(a, b, mesh, columns=cut(2, 3)),
        "size of a cut": lambda: matmul(a, b, mesh, columns=3),
        "unused inner": lambda: matmul(a, b, mesh, inner=4),
        "unused rows": lambda: matmul(a, b, mesh, rows=3),
        "unused rows by rows": lambda: matmul(a, b, mesh, "row", rows=3),
        "unused columns": lambda: matmul(a, b, mesh, "row", columns=2),
        "pair by rows": lambda: matmul(a, b, mesh, "row", inner=pair),
        "one cut": lambda: matmul(a, b, mesh, "2d", grid=(1, 4), inner=cut(4, 4)),
        "pair": lambda: matmul(
            a, b, mesh, "2d", a_is="shard", b_is="shard", rows=3, columns=2, inner=(cut(4, 2), cut(5, 2))
        ),
        "subgroup": lambda: ranks.subgroup([(ranks.rank + 1) % 4]),
        "outside": lambda: ranks.subgroup([ranks.rank, 4]),
    }
    messages = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        messages[name] = str(caught.value)
    return messages


def test_what_does_not_fit_is_refused(ranks: Callable[[int], Pool]) -> None:
    expected = {
        "split": "split must be one of 'column', 'row', '2d', not 'rows'",
        "form": "result must be one of 'whole', 'shard', not 'part'",
        "vector": "b must be a matrix, but has 1 dimensions",
        "dtypes": "one dtype, not torch.float32 and torch.float64",
        "bool": "a must be a dense matrix of real numbers, not torch.bool",
        "inner column": "the inner dimensions differ: a is 3 x 4, b is 2 x 4",
        "inner row": "the inner dimensions differ: a is 3 x 4, b is 2 x 4",
        "inner 2d": "the inner dimensions differ: a is 3 x 4, b is 2 x 4",
        "grid": "a grid of 2 x 3 needs 6 ranks, but the group has 4. Grids that fit: 1 x 4, 2 x 2, 4 x 1",
        "grid twice": "grid=(1, 4) contradicts the Grid(2 x 2",
        "grid by columns": "belong to split='2d', not to split='column'",
        "grid as group": "pass grid.ranks, or use split='2d'",
        "panel by columns": "belong to split='2d'",
        "panel": "panel must be a width of at least 1, not 0",
        "unknown": "give columns=<size>",
        "shard of b": "b, the shard of rank 3, should be 4 x 0, but is 4 x 2",
        "shard of a": "a, the shard of rank 3, should be 3 x 1, but is 3 x 4",
        "ranks of a cut": "columns must be cut over 4 ranks, not 3",
        "size of a cut": "columns says 3, but the whole matrix has 2",
        "unused inner": "leave inner out",
        "unused rows": "cuts rows only if a is a shard",
        "unused rows by rows": "cuts rows only for result='shard'",
        "unused columns": "leave columns out",
        "pair by rows": "a pair of cuts is for split='2d'",
        "one cut": "a pair of cuts on a grid of 1 x 4",
        "pair": "differ in size: 4 and 5",
        "subgroup": "rank 3 cannot make the subgroup [0]",
        "outside": "has ranks outside of 0 to 3",
    }
    messages = ranks(4).run(_refused)[3]
    assert set(messages) == set(expected)
    for name, text in expected.items():
        assert text in messages[name], name
