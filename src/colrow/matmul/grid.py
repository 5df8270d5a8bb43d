"""A rectangular grid of ranks, with a communicator along each grid row and each grid column."""

from __future__ import annotations

from math import isqrt

from colrow.collectives import Communicator, Group, communicator


def near_square(ranks: int) -> tuple[int, int]:
    """The shape ``(rows, columns)``, rows x columns = ranks, that is nearest to a square, rows <= columns."""
    rows = next(size for size in range(isqrt(ranks), 0, -1) if ranks % size == 0)
    return rows, ranks // rows


class Grid:
    """The ranks of a group as ``rows x columns``, filled row by row: group rank ``row * columns + column``.

    Making a grid is collective among the ranks of the group. The groups of its rows and columns are kept
    by the group's communicator, so that a grid of the same shape costs nothing the second time.

    Args:
        group: process group, mesh (its only dimension, else ``tp``) or communicator.
        shape: ``(rows, columns)``; default: the shape nearest to a square.

    Attributes:
        ranks: communicator of the whole group.
        rows, columns: the shape.
        row, column: this rank's place.
        row_ranks: communicator of this rank's grid row: ``columns`` ranks, in order of their column.
        column_ranks: communicator of this rank's grid column: ``rows`` ranks, in order of their row.

    Raises:
        ValueError: if rows x columns is not the number of ranks.
        RankFailure: if another rank died, raised or did not come within the group's timeout.
    """

    def __init__(self, group: Group, shape: tuple[int, int] | None = None) -> None:
        self.ranks: Communicator = communicator(group)
        size = self.ranks.size
        self.rows, self.columns = near_square(size) if shape is None else _checked(shape, size)
        self.row, self.column = divmod(self.ranks.rank, self.columns)
        first = self.row * self.columns
        # every rank makes its row's group first: no two ranks wait for each other in different groups
        self.row_ranks = self.ranks.subgroup(range(first, first + self.columns))
        self.column_ranks = self.ranks.subgroup(range(self.column, size, self.columns))

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def communicators(self) -> tuple[Communicator, ...]:
        """The different communicators that the grid uses."""
        return tuple({id(one): one for one in (self.ranks, self.row_ranks, self.column_ranks)}.values())

    def __repr__(self) -> str:
        return f"Grid({self.rows} x {self.columns}, this rank at row {self.row}, column {self.column})"


def _checked(shape: tuple[int, int], ranks: int) -> tuple[int, int]:
    rows, columns = shape
    if rows >= 1 and columns >= 1 and rows * columns == ranks:
        return rows, columns
    choices = ", ".join(f"{size} x {ranks // size}" for size in range(1, ranks + 1) if ranks % size == 0)
    raise ValueError(
        f"a grid of {rows} x {columns} needs {rows * columns} ranks, but the group has {ranks}. "
        f"Grids that fit: {choices}"
    )
