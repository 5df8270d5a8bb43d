"""SUMMA: matrix products of blocks on a grid of ranks (R. van de Geijn and J. Watts, 1997).

``X`` [M, K], ``Y`` [K, N] and ``Z`` [M, N] lie in blocks on a grid of r x c ranks. M is cut over the grid
rows, N over the grid columns, and K over the grid columns for X and over the grid rows for Y::

    rank (i, j) holds  X[M_i, K_j]   Y[K_i, N_j]   Z[M_i, N_j]

K is walked through in panels, each within one block of X and one of Y. Three products need no block to
be moved but along its grid row or its grid column:

=======  ==========================  ======================================================================
product  computes                    per panel
=======  ==========================  ======================================================================
Z        ``Z = X Y``                 X's panel is broadcast along grid rows, Y's along grid columns; add up
X        ``X = Z Y^T``               Y's panel is broadcast along grid columns; sum along grid rows
Y        ``Y = X^T Z``               X's panel is broadcast along grid rows; sum along grid columns
=======  ==========================  ======================================================================

The gradients of each of the three are the other two, so that derivatives of any order are SUMMA again, and
no rank ever keeps more than its blocks: panels are broadcast anew in backward. In the words of the typed
collectives a broadcast takes a panel V → R and its adjoint, the sum on the owner, takes P → V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from colrow.collectives import Communicator, Pending
from colrow.layout import Cut
from colrow.matmul.grid import Grid

Product = Literal["X", "Y", "Z"]


class Panel(NamedTuple):
    """A range of K. ``column`` is the grid column with X's part of it, ``row`` the grid row with Y's.

    ``in_x`` and ``in_y`` say where the range begins within the owners' blocks.
    """

    width: int
    column: int
    in_x: int
    row: int
    in_y: int


def panels(x_cut: Cut, y_cut: Cut, widest: int | None) -> list[Panel]:
    """The common refinement of the two cuts of K, in pieces of at most ``widest``; none is empty."""
    found = []
    for low, high in pairwise(sorted({*x_cut.boundaries, *y_cut.boundaries})):
        column, row = _owner(x_cut, low), _owner(y_cut, low)
        for start in range(low, high, widest or high - low):
            width = min(high, start + (widest or high - low)) - start
            panel = Panel(width, column, start - x_cut.start(column), row, start - y_cut.start(row))
            found.append(panel)
    return found


def _owner(cut: Cut, index: int) -> int:
    return next(rank for rank in range(cut.ranks) if cut.start(rank) <= index < cut.stop(rank))


@dataclass(frozen=True)
class Summa:
    """The products of blocks that are cut alike.

    Attributes:
        grid: the ranks.
        x_cut: cut of K over the grid columns, X's blocks.
        y_cut: cut of K over the grid rows, Y's blocks.
        widest: greatest width of a panel; ``None``: as wide as the blocks allow.
        label: names the collectives in errors and statistics.
    """

    grid: Grid
    x_cut: Cut
    y_cut: Cut
    widest: int | None
    label: str

    def multiply(self, product: Product, left: Tensor, right: Tensor) -> Tensor:
        """This rank's block of Z = X Y, X = Z Y^T or Y = X^T Z, from its blocks; differentiable."""
        if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
            return _Multiply.apply(left, right, product, self)
        return self.run(product, left, right)

    def run(self, product: Product, left: Tensor, right: Tensor) -> Tensor:
        """:meth:`multiply` without autograd."""
        if product == "Z":
            return self._z(left, right)
        return self._x(left, right) if product == "X" else self._y(left, right)

    def _z(self, x: Tensor, y: Tensor) -> Tensor:
        # a half-precision sum over panels would round once per panel
        half = x.dtype in (torch.bfloat16, torch.float16)
        z = x.new_zeros(x.shape[0], y.shape[1], dtype=torch.float32 if half else x.dtype)
        for (_, x_panel), (_, y_panel) in zip(self._panels_of_x(x), self._panels_of_y(y), strict=True):
            if half:
                z += x_panel @ y_panel
            else:
                z.addmm_(x_panel, y_panel)
        return z.to(x.dtype)

    def _x(self, z: Tensor, y: Tensor) -> Tensor:
        x = z.new_zeros(z.shape[0], self.x_cut.count(self.grid.column))
        sums = _Sums(self.grid.row_ranks, f"{self.label}: sum along grid row")
        for panel, y_panel in self._panels_of_y(y):
            mine = panel.column == self.grid.column
            target = x.narrow(1, panel.in_x, panel.width) if mine else None
            sums.add(z @ y_panel.t(), panel.column, target)
        sums.finish()
        return x

    def _y(self, x: Tensor, z: Tensor) -> Tensor:
        y = z.new_zeros(self.y_cut.count(self.grid.row), z.shape[1])
        sums = _Sums(self.grid.column_ranks, f"{self.label}: sum along grid column")
        for panel, x_panel in self._panels_of_x(x):
            mine = panel.row == self.grid.row
            target = y.narrow(0, panel.in_y, panel.width) if mine else None
            sums.add(x_panel.t() @ z, panel.row, target)
        sums.finish()
        return y

    @property
    def panels(self) -> list[Panel]:
        return panels(self.x_cut, self.y_cut, self.widest)

    def _panels_of_x(self, x: Tensor) -> Iterator[tuple[Panel, Tensor]]:
        """Each panel of X, [M_i, width], on all ranks of the grid row."""

        def start(panel: Panel) -> Pending:
            mine = panel.column == self.grid.column
            piece = x.narrow(1, panel.in_x, panel.width) if mine else x.new_empty(x.shape[0], panel.width)
            return _broadcast(self.grid.row_ranks, piece, panel.column, f"{self.label}: along grid row")

        return _one_ahead(self.panels, start)

    def _panels_of_y(self, y: Tensor) -> Iterator[tuple[Panel, Tensor]]:
        """Each panel of Y, [width, N_j], on all ranks of the grid column."""

        def start(panel: Panel) -> Pending:
            mine = panel.row == self.grid.row
            piece = y.narrow(0, panel.in_y, panel.width) if mine else y.new_empty(panel.width, y.shape[1])
            return _broadcast(self.grid.column_ranks, piece, panel.row, f"{self.label}: along grid column")

        return _one_ahead(self.panels, start)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, product: Product, summa: Summa) -> Tensor:
        ctx.product, ctx.summa = product, summa
        ctx.save_for_backward(left, right)
        return summa.run(product, left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        left, right = ctx.saved_tensors
        multiply = ctx.summa.multiply
        of_left = of_right = None
        if ctx.needs_input_grad[0]:
            if ctx.product == "Z":
                of_left = multiply("X", gradient, right)
            elif ctx.product == "X":
                of_left = multiply("Z", gradient, right)
            else:
                of_left = multiply("X", right, gradient)
        if ctx.needs_input_grad[1]:
            if ctx.product == "Z":
                of_right = multiply("Y", left, gradient)
            elif ctx.product == "X":
                of_right = multiply("Y", gradient, left)
            else:
                of_right = multiply("Z", left, gradient)
        return of_left, of_right, None, None


def _broadcast(ranks: Communicator, piece: Tensor, source: int, label: str) -> Pending:
    """``piece`` of rank ``source``; all ranks give one of its shape. The result is only read."""
    if ranks.size == 1 or piece.numel() == 0:
        return Pending.completed(piece)
    return ranks.start_broadcast(piece, source, label=label, owned=ranks.rank != source)


def _one_ahead(panels: Sequence[Panel], start: Callable[[Panel], Pending]) -> Iterator[tuple[Panel, Tensor]]:
    """Each panel with its values; the next one is under way while the caller works on this one."""
    under_way = [start(panel) for panel in panels[:1]]
    for index, panel in enumerate(panels):
        under_way += [start(following) for following in panels[index + 1 : index + 2]]
        yield panel, under_way.pop(0).wait()


class _Sums:
    """Sums over the ranks, each for one of them; one is under way while the next is computed."""

    def __init__(self, ranks: Communicator, label: str) -> None:
        self._ranks = ranks
        self._label = label
        self._under_way: tuple[Pending, Tensor | None] | None = None

    def add(self, part: Tensor, destination: int, target: Tensor | None) -> None:
        """Start to sum ``part``, memory of ours; the rank ``destination`` gives where the sum goes."""
        pending = Pending.completed(part)
        if part.numel():
            pending = self._ranks.start_reduce(part, destination, label=self._label, owned=True)
        self.finish()
        self._under_way = pending, target

    def finish(self) -> None:
        """Wait for the sum that is under way."""
        if self._under_way is not None:
            pending, target = self._under_way
            result = pending.wait()
            if target is not None:
                target.copy_(result)
            self._under_way = None
