"""Distributed products against the one-process product: values, first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product as combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from colrow.collectives import communicator
from colrow.layout import Cut
from colrow.matmul import Grid, MatmulResult, matmul
from tests.pool import Pool, worker_mesh

SIZES = [1, 2, 3, 4]
FORMS = list(combinations(("whole", "shard"), repeat=3))
SHAPES = [(5, 7, 6), (8, 4, 12), (2, 3, 1), (1, 1, 1), (4, 0, 3), (0, 3, 2), (3, 2, 0)]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Place:
    """What one rank holds of A, B and C as half-open ranges (rows, columns)."""

    a: tuple[slice, slice]
    b: tuple[slice, slice]
    c: tuple[slice, slice]


def _ranges(cut: Cut, rank: int) -> slice:
    return slice(cut.start(rank), cut.stop(rank))


ALL = slice(None)


def _place_1d(split: str, rank: int, m: Cut, k: Cut, n: Cut) -> Place:
    if split == "column":
        return Place((_ranges(m, rank), ALL), (ALL, _ranges(n, rank)), (ALL, _ranges(n, rank)))
    return Place((ALL, _ranges(k, rank)), (_ranges(k, rank), ALL), (_ranges(m, rank), ALL))


def _place_2d(grid: Grid, m: Cut, k: tuple[Cut, Cut], n: Cut) -> Place:
    i, j = grid.row, grid.column
    return Place(
        (_ranges(m, i), _ranges(k[0], j)), (_ranges(k[1], i), _ranges(n, j)), (_ranges(m, i), _ranges(n, j))
    )


def _check(
    place: Place,
    forms: tuple[str, str, str],
    shape: tuple[int, int, int],
    multiply: Callable[[Tensor, Tensor], MatmulResult],
    second: bool,
) -> MatmulResult:
    """C, the gradients of sum(W * C^3) and their derivatives along random directions."""
    m, k, n = shape
    whole = {"a": _random(m, k, seed=1), "b": _random(k, n, seed=2), "w": _random(m, n, seed=3)}
    directions = _random(m, k, seed=4), _random(k, n, seed=5)

    def part(tensor: Tensor, form: str, where: tuple[slice, slice]) -> Tensor:
        return tensor if form == "whole" else tensor[where]

    def own(tensor: Tensor, which: int) -> Tensor:
        return part(tensor, forms[which], (place.a, place.b, place.c)[which])

    a, b = (own(whole[name], index).clone().requires_grad_() for index, name in enumerate("ab"))
    reference_a, reference_b = (whole[name].clone().requires_grad_() for name in "ab")
    result = multiply(a, b)
    expected = reference_a @ reference_b
    torch.testing.assert_close(result.product, own(expected, 2), rtol=0, atol=1e-12)
    assert result.shape == (m, n)
    torch.testing.assert_close(
        expected[slice(*result.rows), slice(*result.columns)], result.product, rtol=0, atol=1e-12
    )

    cotangent = own(whole["w"], 2)
    gradients = torch.autograd.grad((cotangent * result.product**3).sum(), (a, b), create_graph=second)
    references = torch.autograd.grad(
        (whole["w"] * expected**3).sum(), (reference_a, reference_b), create_graph=True
    )
    for index in (0, 1):
        torch.testing.assert_close(gradients[index], own(references[index], index), rtol=0, atol=1e-10)
    if second:
        own_directions = [own(direction, index) for index, direction in enumerate(directions)]
        gradients = torch.autograd.grad(gradients, (a, b), own_directions)
        references = torch.autograd.grad(references, (reference_a, reference_b), directions)
        for index in (0, 1):
            torch.testing.assert_close(gradients[index], own(references[index], index), rtol=0, atol=1e-9)
    return result


def _one_dimension(size: int, split: str) -> None:
    mesh = worker_mesh(size)
    rank = communicator(mesh).rank
    for shape, forms in combinations(SHAPES, FORMS):
        m, k, n = (Cut.balanced(extent, size) for extent in shape)
        arguments: dict[str, Any] = {}
        if split == "column":
            arguments["columns"] = n if forms[1] == "shard" else None
            arguments["rows"] = m.units if forms[0] == "shard" else None
        elif "whole" not in forms[:2]:
            arguments["inner"] = k.units
        names = dict(zip(("a_is", "b_is", "result"), forms, strict=True))
        _check(
            _place_1d(split, rank, m, k, n),
            forms,
            shape,
            lambda a, b, names=names, arguments=arguments: matmul(a, b, mesh, split, **names, **arguments),  # type: ignore[misc]
            second=shape == SHAPES[0],
        )


@pytest.mark.parametrize("split", ["column", "row"])
@pytest.mark.parametrize("size", SIZES)
def test_by_columns_and_by_rows(ranks: Callable[[int], Pool], size: int, split: str) -> None:
    ranks(size).run(_one_dimension, size, split)


def _custom_cuts(split: str) -> None:
    """Cuts that no default gives: lopsided, with a rank that holds nothing."""
    mesh = worker_mesh(3)
    rank = communicator(mesh).rank
    m, k, n = Cut.from_counts([1, 3, 1]), Cut.from_counts([0, 2, 5]), Cut.from_counts([4, 0, 2])
    for forms in FORMS:
        arguments: dict[str, Any] = dict(zip(("a_is", "b_is", "result"), forms, strict=True))
        if split == "column":
            arguments |= {"columns": n} | ({"rows": m} if forms[0] == "shard" else {})
        else:
            arguments |= {"inner": k} | ({"rows": m} if forms[2] == "shard" else {})
        _check(
            _place_1d(split, rank, m, k, n),
            forms,
            (5, 7, 6),
            lambda a, b, arguments=arguments: matmul(a, b, mesh, split, **arguments),  # type: ignore[misc]
            second=False,
        )


@pytest.mark.parametrize("split", ["column", "row"])
def test_custom_cuts(ranks: Callable[[int], Pool], split: str) -> None:
    ranks(3).run(_custom_cuts, split)


def _on_a_grid(size: int, shape: tuple[int, int], shapes: list[tuple[int, int, int]]) -> None:
    grid = Grid(worker_mesh(size), shape)
    for (m_, k_, n_), forms in combinations(shapes, FORMS):
        m, n = Cut.balanced(m_, grid.rows), Cut.balanced(n_, grid.columns)
        k = Cut.balanced(k_, grid.columns), Cut.balanced(k_, grid.rows)
        arguments: dict[str, Any] = dict(zip(("a_is", "b_is", "result"), forms, strict=True))
        if forms[0] == "shard":
            arguments["rows"] = m_
        if forms[1] == "shard":
            arguments["columns"] = n
        if "whole" not in forms[:2]:
            arguments["inner"] = k_
        _check(
            _place_2d(grid, m, k, n),
            forms,
            (m_, k_, n_),
            lambda a, b, arguments=arguments: matmul(a, b, grid, "2d", **arguments),  # type: ignore[misc]
            second=(m_, k_, n_) == SHAPES[0],
        )


@pytest.mark.parametrize(
    ("size", "shape"), [(1, (1, 1)), (2, (1, 2)), (2, (2, 1)), (3, (3, 1)), (4, (1, 4)), (4, (2, 2))]
)
def test_on_a_grid(ranks: Callable[[int], Pool], size: int, shape: tuple[int, int]) -> None:
    ranks(size).run(_on_a_grid, size, shape, SHAPES)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_on_a_grid_that_is_not_square(ranks: Callable[[int], Pool], shape: tuple[int, int]) -> None:
    """K = 7 over 3 and over 2: no boundary of the one cut is one of the other."""
    ranks(6).run(_on_a_grid, 6, shape, SHAPES[:1])


def _narrow_panels_and_custom_cuts() -> None:
    grid = Grid(worker_mesh(4))
    m, n = Cut.from_counts([4, 1]), Cut.from_counts([0, 6])
    k = Cut.from_counts([2, 5]), Cut.from_counts([6, 1])
    for panel, forms in combinations((None, 1, 2), (("whole",) * 3, ("shard",) * 3)):
        names: dict[str, Any] = dict(zip(("a_is", "b_is", "result"), forms, strict=True))
        result = _check(
            _place_2d(grid, m, k, n),
            forms,  # type: ignore[arg-type]
            (5, 7, 6),
            lambda a, b, names=names, panel=panel: matmul(  # type: ignore[misc]
                a, b, grid, "2d", rows=m, inner=k, columns=n, panel=panel, **names
            ),
            second=panel == 2,
        )
        broadcasts = result.communication.where(label="along grid row")
        # panels of at most 2 within [0, 2), [2, 6), [6, 7)
        assert broadcasts.count == {None: 3, 1: 7, 2: 4}[panel]
        assert broadcasts.bytes == 7 * m.count(grid.row) * 8


def test_narrow_panels_and_custom_cuts(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_narrow_panels_and_custom_cuts)


def _chain(size: int) -> None:
    """Shards fit each other: rows of X -> columns of the hidden layer -> rows of the output."""
    mesh = worker_mesh(size)
    rank = communicator(mesh).rank
    x, u, v = _random(5, 4, seed=1), _random(4, 7, seed=2), _random(7, 3, seed=3)
    rows, hidden = Cut.balanced(5, size), Cut.balanced(7, size)
    own = [
        x[_ranges(rows, rank)].clone().requires_grad_(),
        u[:, _ranges(hidden, rank)].clone().requires_grad_(),
        v[_ranges(hidden, rank)].clone().requires_grad_(),
    ]
    forms: dict[str, Any] = {"a_is": "shard", "b_is": "shard", "result": "shard"}
    y = matmul(own[0], own[1], mesh, "column", rows=5, columns=7, **forms).product
    z = matmul(torch.tanh(y), own[2], mesh, "row", inner=7, **forms).product
    cotangent = _random(5, 3, seed=4)
    z.backward(cotangent[_ranges(rows, rank)])
    whole = [tensor.clone().requires_grad_() for tensor in (x, u, v)]
    (torch.tanh(whole[0] @ whole[1]) @ whole[2]).backward(cotangent)
    places = (_ranges(rows, rank), ALL), (ALL, _ranges(hidden, rank)), (_ranges(hidden, rank), ALL)
    for mine, reference, place in zip(own, whole, places, strict=True):
        assert reference.grad is not None
        torch.testing.assert_close(mine.grad, reference.grad[place], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_column_then_row(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_chain, size)
