"""The product C = A B of two matrices over the ranks of a group: by columns, by rows, or on a 2D grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from colrow.collectives import AllGather, AllReduce, Communicator, Enter, Group, ReduceScatter, Slice
from colrow.collectives import communicator as communicator_of
from colrow.layout import Cut
from colrow.matmul.grid import Grid
from colrow.matmul.result import MatmulResult, Meter
from colrow.matmul.summa import Summa

Split: TypeAlias = Literal["column", "row", "2d"]
Form: TypeAlias = Literal["whole", "shard"]
Extent: TypeAlias = int | Cut | None
"""A dimension's size, cut in balanced parts, or its cut; ``None``: known from a whole operand."""


def matmul(
    a: Tensor,
    b: Tensor,
    group: Group | Grid,
    split: Split = "column",
    *,
    a_is: Form = "whole",
    b_is: Form = "whole",
    result: Form = "whole",
    rows: Extent = None,
    inner: Extent | tuple[Cut, Cut] = None,
    columns: Extent = None,
    grid: tuple[int, int] | None = None,
    panel: int | None = None,
    label: str = "matmul",
) -> MatmulResult:
    """C = A B for A [M, K] and B [K, N], computed by all ranks of a group together; differentiable.

    ``split`` says which dimension the work is cut along, and with it what a shard is:

    ============  ==============  ==============  ==============  =========================================
    split         shard of A      shard of B      shard of C      communication
    ============  ==============  ==============  ==============  =========================================
    ``"column"``  M cut           N cut           N cut           whole C: all-gather of C;
                                                                  shard of A: all-gather of A
    ``"row"``     K cut           K cut           M cut           whole C: all-reduce of C;
                                                                  shard of C: reduce-scatter of C
    ``"2d"``      M and K cut     K and N cut     M and N cut     SUMMA: panels of A along grid rows, of B
                                                                  along grid columns; whole C: all-gathers
    ============  ==============  ==============  ==============  =========================================

    The shards fit each other: a column product's shard of C is the row product's shard of A, and the row
    product's shard of C the column product's shard of A. On a grid rank (i, j) holds A[M_i, K_j], B[K_i, N_j]
    and C[M_i, N_j]; K is cut over the grid columns for A and over the grid rows for B.

    Gradients, in the types of :mod:`colrow.collectives.typed`:

    - *whole* operands and a *whole* C are invariant (I): equal on all ranks, and so are their gradients. The
      gradient of a whole operand is complete on every rank after backward; the gradient that comes in for a
      whole C must be equal on all ranks, as it is if every rank computes the same loss from it.
    - *shards* are varying (V): a rank's shard has the gradient of that part. What comes in for a shard of C
      is the gradient of that part of C, of the loss summed over the ranks.

    ``requires_grad`` of an operand must agree among the ranks. Derivatives of any order are communicated in
    the same way; on a grid the gradients are SUMMA products again (dA = dC B^T, dB = A^T dC).

    Args:
        a: A or this rank's shard of it. Any strides; sizes may be uneven, smaller than the number of ranks,
            or zero.
        b: B or this rank's shard of it, of the dtype and device of ``a``.
        group: process group, mesh (its only dimension, else ``tp``) or communicator; for ``"2d"`` also a
            :class:`Grid`.
        split: ``"column"``, ``"row"`` or ``"2d"``.
        a_is, b_is: ``"whole"`` if every rank passes the same whole matrix, ``"shard"`` if each its part.
        result: ``"whole"`` to have C on every rank, ``"shard"`` to have this rank's part of it.
        rows, inner, columns: how M, K and N are cut: a :class:`colrow.layout.Cut`, or the size, cut in
            balanced parts. Needed only where no whole operand tells the size. On a grid ``rows`` is cut over
            the grid rows, ``columns`` over the grid columns, and ``inner`` may be the pair of A's cut (over
            the grid columns) and B's cut (over the grid rows).
        grid: for ``"2d"``, the shape (rows, columns) of the grid; default: nearest to a square.
        panel: for ``"2d"``, the greatest width of a panel: narrower panels need less memory and more
            messages. Default: as wide as the blocks allow.
        label: names the collectives in errors and statistics.

    Returns:
        The product with its place in C and what this rank communicated for it.

    Raises:
        ValueError: if the arguments do not fit each other; the message says what would.
        RankFailure: if another rank died, raised or did not come within the group's timeout.
    """
    _check_choice("split", split, get_args(Split))
    for name, form in (("a_is", a_is), ("b_is", b_is), ("result", result)):
        _check_choice(name, form, get_args(Form))
    _check_matrices(a, b)
    task = _Task(a, b, a_is == "whole", b_is == "whole", result == "whole", rows, inner, columns, label)
    if split == "2d":
        if isinstance(group, Grid):
            if grid is not None and grid != group.shape:
                raise ValueError(f"grid={grid} contradicts the {group} that was passed: leave it out")
            return _on_grid(task, group, panel)
        return _on_grid(task, Grid(group, grid), panel)
    if isinstance(group, Grid):
        raise ValueError(f"split={split!r} works on a group: pass grid.ranks, or use split='2d'")
    if grid is not None or panel is not None:
        raise ValueError(f"grid and panel belong to split='2d', not to split={split!r}: leave them out")
    return (_by_columns if split == "column" else _by_rows)(task, communicator_of(group))


@dataclass(frozen=True)
class _Task:
    """The arguments of one call."""

    a: Tensor
    b: Tensor
    whole_a: bool
    whole_b: bool
    whole_result: bool
    rows: Extent
    inner: Extent | tuple[Cut, Cut]
    columns: Extent
    label: str

    def check_shapes(self, a: tuple[int, int], b: tuple[int, int], ranks: Communicator) -> None:
        """Raises ValueError unless this rank's operands have these shapes."""
        for name, tensor, shape, whole in (("a", self.a, a, self.whole_a), ("b", self.b, b, self.whole_b)):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name}, {'whole' if whole else f'the shard of rank {ranks.rank}'}, should be "
                    f"{shape[0]} x {shape[1]}, but is {tensor.shape[0]} x {tensor.shape[1]}"
                )


def _by_columns(task: _Task, ranks: Communicator) -> MatmulResult:
    """Every rank has all of A and its columns of B, and computes its columns of C."""
    if task.inner is not None:
        raise ValueError("split='column' does not cut the inner dimension: leave inner out")
    if task.whole_a and task.rows is not None:
        raise ValueError("split='column' cuts rows only if a is a shard: leave rows out")
    a, b, rank = task.a, task.b, ranks.rank
    depth = a.shape[1]
    if b.shape[0] != depth:
        raise _inner_mismatch(a, b)
    columns = _cut("columns", task.columns, ranks.size, b.shape[1] if task.whole_b else None)
    rows = None if task.whole_a else _cut("rows", task.rows, ranks.size, None)
    shape = (a.shape[0] if rows is None else rows.units, columns.units)
    task.check_shapes(
        (shape[0] if rows is None else rows.count(rank), depth),
        (depth, columns.units if task.whole_b else columns.count(rank)),
        ranks,
    )
    meter = Meter([ranks])
    if rows is None:
        a = Enter(ranks, f"{task.label}: A")(a)
    else:
        a = AllGather(ranks, f"{task.label}: A", 0, rows.counts, "R")(a)
    if task.whole_b:
        b = Slice(ranks, f"{task.label}: B", 1, columns.counts, "I")(b)
    c = a @ b
    if task.whole_result:
        c = AllGather(ranks, f"{task.label}: C", 1, columns.counts, "I")(c)
        held = (0, columns.units)
    else:
        held = (columns.start(rank), columns.stop(rank))
    return MatmulResult(c, shape, (0, shape[0]), held, "column", meter.read())


def _by_rows(task: _Task, ranks: Communicator) -> MatmulResult:
    """Every rank has its columns of A and rows of B, and computes a term of C."""
    if task.columns is not None:
        raise ValueError("split='row' does not cut the columns of C: leave columns out")
    if task.whole_result and task.rows is not None:
        raise ValueError("split='row' cuts rows only for result='shard': leave rows out")
    if isinstance(task.inner, tuple):
        raise ValueError("split='row' cuts the inner dimension once: a pair of cuts is for split='2d'")
    a, b, rank = task.a, task.b, ranks.rank
    if task.whole_a is task.whole_b and a.shape[1] != b.shape[0]:
        raise _inner_mismatch(a, b)
    known = a.shape[1] if task.whole_a else b.shape[0] if task.whole_b else None
    inner = _cut("inner", task.inner, ranks.size, known)
    shape = (a.shape[0], b.shape[1])
    task.check_shapes(
        (shape[0], inner.units if task.whole_a else inner.count(rank)),
        (inner.units if task.whole_b else inner.count(rank), shape[1]),
        ranks,
    )
    meter = Meter([ranks])
    if task.whole_a:
        a = Slice(ranks, f"{task.label}: A", 1, inner.counts, "I")(a)
    if task.whole_b:
        b = Slice(ranks, f"{task.label}: B", 0, inner.counts, "I")(b)
    c = a @ b
    if task.whole_result:
        c = AllReduce(ranks, f"{task.label}: C", "I")(c)
        held = (0, shape[0])
    else:
        rows = _cut("rows", task.rows, ranks.size, shape[0])
        c = ReduceScatter(ranks, f"{task.label}: C", 0, rows.counts)(c)
        held = (rows.start(rank), rows.stop(rank))
    return MatmulResult(c, shape, held, (0, shape[1]), "row", meter.read())


def _on_grid(task: _Task, grid: Grid, panel: int | None) -> MatmulResult:
    """Every rank has a block of A, B and C."""
    if panel is not None and panel < 1:
        raise ValueError(f"panel must be a width of at least 1, not {panel}")
    a, b = task.a, task.b
    if task.whole_a and task.whole_b and a.shape[1] != b.shape[0]:
        raise _inner_mismatch(a, b)
    rows = _cut("rows", task.rows, grid.rows, a.shape[0] if task.whole_a else None)
    columns = _cut("columns", task.columns, grid.columns, b.shape[1] if task.whole_b else None)
    known = a.shape[1] if task.whole_a else b.shape[0] if task.whole_b else None
    inner_a, inner_b = _inner_cuts(task.inner, grid, known)
    m, n = rows.count(grid.row), columns.count(grid.column)
    task.check_shapes(
        (rows.units, inner_a.units) if task.whole_a else (m, inner_a.count(grid.column)),
        (inner_b.units, columns.units) if task.whole_b else (inner_b.count(grid.row), n),
        grid.ranks,
    )
    meter = Meter(grid.communicators)
    if task.whole_a:
        a = _block(a, grid, rows, inner_a, f"{task.label}: A")
    if task.whole_b:
        b = _block(b, grid, inner_b, columns, f"{task.label}: B")
    c = Summa(grid, inner_a, inner_b, panel, task.label).multiply("Z", a, b)
    shape = (rows.units, columns.units)
    if not task.whole_result:
        held_rows = (rows.start(grid.row), rows.stop(grid.row))
        held_columns = (columns.start(grid.column), columns.stop(grid.column))
        return MatmulResult(c, shape, held_rows, held_columns, "2d", meter.read())
    c = AllGather(grid.row_ranks, f"{task.label}: C", 1, columns.counts, "I")(c)
    c = AllGather(grid.column_ranks, f"{task.label}: C", 0, rows.counts, "I")(c)
    return MatmulResult(c, shape, (0, shape[0]), (0, shape[1]), "2d", meter.read())


def _block(whole: Tensor, grid: Grid, rows: Cut, columns: Cut, label: str) -> Tensor:
    """I → V along both dimensions of the grid: this rank's block."""
    strip = Slice(grid.column_ranks, label, 0, rows.counts, "I")(whole)
    return Slice(grid.row_ranks, label, 1, columns.counts, "I")(strip)


def _inner_cuts(given: Extent | tuple[Cut, Cut], grid: Grid, known: int | None) -> tuple[Cut, Cut]:
    """The cut of A's columns over the grid columns and of B's rows over the grid rows."""
    if isinstance(given, Cut) and grid.rows != grid.columns:
        raise ValueError(
            f"inner must be a pair of cuts on a grid of {grid.rows} x {grid.columns}: A's columns over "
            f"{grid.columns} ranks, B's rows over {grid.rows}"
        )
    of_a, of_b = given if isinstance(given, tuple) else (given, given)
    inner_a = _cut("inner", of_a, grid.columns, known)
    inner_b = _cut("inner", of_b, grid.rows, known)
    if inner_a.units != inner_b.units:
        raise ValueError(
            f"the two cuts of the inner dimension differ in size: {inner_a.units} and {inner_b.units}"
        )
    return inner_a, inner_b


def _cut(name: str, given: Extent, ranks: int, known: int | None) -> Cut:
    """The cut over ``ranks`` of a dimension whose size is ``known`` if a whole operand has it."""
    if given is None:
        if known is None:
            raise ValueError(
                f"shards alone do not tell how large the dimension is: give {name}=<size>, cut in balanced "
                f"parts, or {name}=<Cut>"
            )
        return Cut.balanced(known, ranks)
    cut = Cut.balanced(given, ranks) if isinstance(given, int) else given
    if cut.ranks != ranks:
        raise ValueError(f"{name} must be cut over {ranks} ranks, not {cut.ranks}")
    if known is not None and cut.units != known:
        raise ValueError(f"{name} says {cut.units}, but the whole matrix has {known}")
    return cut


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _check_matrices(a: Tensor, b: Tensor) -> None:
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be a matrix, but has {tensor.dim()} dimensions: flatten it to two")
        if tensor.dtype is torch.bool or tensor.is_complex() or tensor.layout is not torch.strided:
            raise ValueError(
                f"{name} must be a dense matrix of real numbers, not {tensor.dtype}, {tensor.layout}"
            )
    if a.dtype != b.dtype:
        raise ValueError(f"a and b must have one dtype, not {a.dtype} and {b.dtype}: convert one of them")
    if a.device != b.device:
        raise ValueError(f"a and b must be on one device, not {a.device} and {b.device}: move one of them")


def _inner_mismatch(a: Tensor, b: Tensor) -> ValueError:
    return ValueError(
        f"the inner dimensions differ: a is {a.shape[0]} x {a.shape[1]}, b is {b.shape[0]} x {b.shape[1]}; "
        f"b needs as many rows as a has columns"
    )
