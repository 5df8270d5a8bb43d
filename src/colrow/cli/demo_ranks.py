"""What each rank of ``colrow demo matmul`` does: multiply in every way, note what it held and computed."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colrow.layout import Cut
from colrow.matmul import Grid, MatmulResult, matmul
from colrow.mesh import init_mesh

Rows = list[list[float]]

A: Rows = [[1, 2], [3, 4]]
B: Rows = [[5, 6], [7, 8]]
D: Rows = [[2, 1], [1, 3]]


@dataclass(frozen=True)
class Part:
    """Consecutive rows and columns of a matrix: half-open ranges and the values."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    values: Rows

    @property
    def is_empty(self) -> bool:
        return self.rows[0] == self.rows[1] or self.columns[0] == self.columns[1]

    def at(self, row: int, column: int) -> float | None:
        """The value at a place of the whole matrix, if it lies in this part."""
        if self.rows[0] <= row < self.rows[1] and self.columns[0] <= column < self.columns[1]:
            return self.values[row - self.rows[0]][column - self.columns[0]]
        return None


@dataclass(frozen=True)
class Share:
    """One rank's share of one product.

    Attributes:
        left, right: the factors' parts that it held.
        alone: what it computed from them before anything was exchanged.
        whole: the product that it had afterwards.
        moved: (count, bytes) of its collectives by operation.
    """

    left: Part
    right: Part
    alone: Part
    whole: Rows
    moved: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Report:
    """What one rank of the demo saw. ``pair`` is (A B) D: by columns, then by rows."""

    rank: int
    process: int
    column: Share
    row: Share
    pair: Share
    grid: Share
    grid_shape: tuple[int, int]


def multiply(folder: str, ranks: int) -> None:
    """On every rank: compute all the products and write the :class:`Report` to ``folder``."""
    mesh = init_mesh(tp=ranks, device="cpu")
    grid = Grid(mesh)
    size = len(A)  # all the matrices are square and of one size
    own = _range(size, grid.ranks.size, grid.ranks.rank)
    everything = (0, size)
    column, hidden = _by_columns(mesh, own, everything)
    report = Report(
        rank=grid.ranks.rank,
        process=os.getpid(),
        column=column,
        row=_by_rows(mesh, _part(A, everything, own), _part(B, own, everything)),
        pair=_by_rows(mesh, hidden, _part(D, own, everything)),
        grid=_on_grid(grid, size),
        grid_shape=grid.shape,
    )
    (Path(folder) / f"{report.rank}.pickle").write_bytes(pickle.dumps(report))


def _by_columns(mesh: DeviceMesh, own: tuple[int, int], everything: tuple[int, int]) -> tuple[Share, Part]:
    """A B with B cut by columns, and this rank's columns of it."""
    a, b = _part(A, everything, everything), _part(B, everything, own)
    product = partial(matmul, _tensor(a), _tensor(b), mesh, "column", b_is="shard", columns=len(B))
    shard, whole = product(result="shard"), product(result="whole")
    return _share(a, b, _held(shard), whole), _held(shard)


def _by_rows(mesh: DeviceMesh, left: Part, right: Part) -> Share:
    """A product with the left factor cut by columns and the right one by rows."""
    x, y = _tensor(left), _tensor(right)
    whole = matmul(x, y, mesh, "row", a_is="shard", b_is="shard", inner=len(A))
    return _share(left, right, Part(left.rows, right.columns, (x @ y).tolist()), whole)


def _on_grid(grid: Grid, size: int) -> Share:
    """A B by SUMMA."""
    along_rows = _range(size, grid.rows, grid.row)
    along_columns = _range(size, grid.columns, grid.column)
    a, b = _part(A, along_rows, along_columns), _part(B, along_rows, along_columns)
    product = partial(matmul, _tensor(a), _tensor(b), grid, "2d", a_is="shard", b_is="shard")
    product = partial(product, rows=size, inner=size, columns=size)
    block, whole = product(result="shard"), product(result="whole")
    return _share(a, b, _held(block), whole)


def _range(size: int, ranks: int, rank: int) -> tuple[int, int]:
    cut = Cut.balanced(size, ranks)
    return cut.start(rank), cut.stop(rank)


def _part(whole: Rows, rows: tuple[int, int], columns: tuple[int, int]) -> Part:
    return Part(rows, columns, [row[slice(*columns)] for row in whole[slice(*rows)]])


def _tensor(part: Part) -> Tensor:
    shape = part.rows[1] - part.rows[0], part.columns[1] - part.columns[0]
    return torch.tensor(part.values, dtype=torch.float64).reshape(shape)


def _held(result: MatmulResult) -> Part:
    return Part(result.rows, result.columns, result.product.tolist())


def _share(left: Part, right: Part, alone: Part, whole: MatmulResult) -> Share:
    moved: dict[str, tuple[int, int]] = {}
    for (operation, _, _), tally in whole.communication.tallies.items():
        count, size = moved.get(operation, (0, 0))
        moved[operation] = count + tally.count, size + tally.bytes
    return Share(left, right, alone, whole.product.tolist(), moved)
