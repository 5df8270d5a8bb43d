"""Distributed products: what is moved, data types, strides, subgroups, the reuse of grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import colrow
from colrow.collectives import communicator
from colrow.matmul import Grid, matmul
from tests.pool import Pool, worker_mesh


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _moved() -> dict[str, Any]:
    """Exact counts and bytes, forward (from the result) and backward (from the statistics)."""
    mesh = worker_mesh(4)
    grid = Grid(mesh)
    found = {}
    for name, group, split, form in (
        ("column whole", mesh, "column", "whole"),
        ("column shard", mesh, "column", "shard"),
        ("row whole", mesh, "row", "whole"),
        ("row shard", mesh, "row", "shard"),
        ("2d whole", grid, "2d", "whole"),
        ("2d shard", grid, "2d", "shard"),
    ):
        a, b = (_random(*shape, seed=1).requires_grad_() for shape in ((8, 4), (4, 12)))
        colrow.reset_comm_stats()
        result = matmul(a, b, group, split, result=form, label=name)  # type: ignore[arg-type]
        (result.product**2).sum().backward()
        moved = {}
        for phase in ("forward", "backward"):
            for operation in ("all_gather", "all_reduce", "reduce_scatter", "broadcast", "reduce"):
                tally = colrow.comm_stats().where(operation=operation, phase=phase, label=name)
                if tally.count:
                    moved[f"{phase} {operation}"] = (tally.count, tally.bytes)
                if phase == "forward":
                    own = result.communication.where(operation=operation)
                    assert (own.count, own.bytes) == (tally.count, tally.bytes)
        found[name] = (moved, repr(result))
    return found


def test_what_is_moved_is_exact(ranks: Callable[[int], Pool]) -> None:
    a, b, c = 8 * 4 * 8, 4 * 12 * 8, 8 * 12 * 8  # bytes of the whole matrices
    found = ranks(4).run(_moved)
    for moved in ({name: one for name, (one, _) in each.items()} for each in found):
        # the gradient of a whole C is sliced, which moves nothing
        by_columns = {"backward all_reduce": (1, a), "backward all_gather": (1, b)}
        assert moved["column whole"] == {"forward all_gather": (1, c)} | by_columns
        assert moved["column shard"] == by_columns
        assert moved["row whole"] == {"forward all_reduce": (1, c), "backward all_gather": (2, a + b)}
        assert moved["row shard"] == {
            "forward reduce_scatter": (1, c),
            "backward all_gather": (3, a + b + c),
        }
        # on 2 x 2 ranks with 2 panels half of A and half of B pass by each rank, forward and backward alike;
        # a whole matrix is gathered in halves along the grid rows and then along the grid columns
        on_grid = {
            "forward broadcast": (4, (a + b) // 2),
            "backward broadcast": (4, (a + b) // 2),
            "backward reduce": (4, (a + b) // 2),
            "backward all_gather": (4, (a + b) * 3 // 2),
        }
        assert moved["2d shard"] == on_grid
        assert moved["2d whole"] == on_grid | {"forward all_gather": (2, c * 3 // 2)}
    texts = {name: text for name, (_, text) in found[1].items()}
    assert texts["column whole"] == (
        "MatmulResult(the whole 8 x 12 product, float64, column split; 1 all_gather of 768 bytes)"
    )
    assert texts["column shard"] == (
        "MatmulResult([0:8, 3:6] of the 8 x 12 product, float64, column split; nothing communicated)"
    )
    assert texts["2d whole"] == (
        "MatmulResult(the whole 8 x 12 product, float64, 2d split; "
        "2 all_gather of 1152 bytes, 4 broadcast of 320 bytes)"
    )


def _only_what_is_needed() -> None:
    """A frozen operand's gradient is neither computed nor communicated; without autograd nothing is kept."""
    grid = Grid(worker_mesh(4))
    a, b = _random(8, 4, seed=1), _random(4, 12, seed=2).requires_grad_()
    matmul(a, b, grid, "2d", label="frozen").product.sum().backward()
    assert b.grad is not None
    torch.testing.assert_close(b.grad, a.t() @ torch.ones(8, 12, dtype=a.dtype), rtol=0, atol=1e-12)
    assert colrow.comm_stats().where(label="frozen: sum along grid row").count == 0
    assert colrow.comm_stats().where(label="frozen: sum along grid column").count == 2
    with torch.no_grad():
        assert not matmul(a, b, grid, "2d").product.requires_grad


def test_frozen_operands_cost_nothing(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_only_what_is_needed)


def _unusual_strides() -> None:
    """Transposed operands, an expanded gradient; the caller's memory is left alone."""
    mesh = worker_mesh(2)
    x, y = _random(7, 5, seed=1), _random(6, 7, seed=2)
    for split in ("column", "row", "2d"):
        a, b = x.t().requires_grad_(), y.t().requires_grad_()
        c = matmul(a, b, mesh, split).product  # type: ignore[arg-type]
        torch.testing.assert_close(c, x.t() @ y.t(), rtol=0, atol=1e-12)
        gradients = torch.autograd.grad(c.sum(), (a, b))
        ones = torch.ones(5, 6, dtype=torch.float64)
        torch.testing.assert_close(gradients[0], ones @ y, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradients[1], x @ ones, rtol=0, atol=1e-12)
        assert torch.equal(x, _random(7, 5, seed=1))
        assert torch.equal(y, _random(6, 7, seed=2))


def test_unusual_strides(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_unusual_strides)


def _data_types() -> None:
    grid = Grid(worker_mesh(4), (1, 4))
    a, b = torch.arange(15).view(3, 5) - 7, torch.arange(10).view(5, 2) - 4
    for split in ("column", "row", "2d"):
        group: Any = grid if split == "2d" else grid.ranks
        assert torch.equal(matmul(a, b, group, split).product, a @ b)  # type: ignore[arg-type]
    # 1 + 3 * 2^-9: each small term alone is lost in bfloat16, their sum is not
    terms = torch.tensor([[1.0, 2.0**-9, 2.0**-9, 2.0**-9]], dtype=torch.bfloat16)
    exact = torch.tensor([[1 + 3 * 2.0**-9]]).to(torch.bfloat16)
    ones = torch.ones(4, 1, dtype=torch.bfloat16)
    assert torch.equal(matmul(terms, ones, grid, "2d", panel=1).product, exact)
    assert torch.equal(matmul(terms, ones, grid.ranks, "row").product, exact)
    # the same sum as a gradient: dA = dC B^T with the columns of C over the ranks
    one = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    c = matmul(one, ones.t(), grid, "2d").product
    c.backward(terms)
    assert one.grad is not None
    assert torch.equal(one.grad, exact)


def test_data_types(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_data_types)


def _subgroups() -> None:
    """Each of two tp groups in one job multiplies matrices of its own."""
    mesh = worker_mesh(tp=2, dp=2)
    replica = communicator(mesh["dp"]).rank
    for group, seed in ((mesh, replica), (mesh["dp"], 10 + communicator(mesh["tp"]).rank)):
        a, b = _random(3, 5, seed=seed), _random(5, 4, seed=seed)
        for split in ("column", "row", "2d"):
            product = matmul(a, b, group, split).product  # type: ignore[arg-type]
            torch.testing.assert_close(product, a @ b, rtol=0, atol=1e-12)
        tall = matmul(a, b, group, "2d", grid=(2, 1)).product
        torch.testing.assert_close(tall, a @ b, rtol=0, atol=1e-12)


def test_subgroups_of_the_world(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_subgroups)


def _grids() -> None:
    mesh = worker_mesh(4)
    grid = Grid(mesh)
    assert grid.shape == (2, 2)
    assert (grid.row, grid.column) == divmod(grid.ranks.rank, 2)
    assert repr(grid) == f"Grid(2 x 2, this rank at row {grid.row}, column {grid.column})"
    again = Grid(communicator(mesh), (2, 2))
    assert again.row_ranks is grid.row_ranks
    assert again.column_ranks is grid.column_ranks
    wide = Grid(mesh, (1, 4))
    assert wide.row_ranks is wide.ranks
    assert wide.column_ranks.size == 1


def test_grids_are_made_once(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_grids)


def _subgroup_timeout() -> tuple[float, float]:
    ranks = communicator(worker_mesh(4))
    pair = ranks.subgroup(sorted((ranks.rank, 3 - ranks.rank)))  # not made by any other test
    assert pair.global_ranks == tuple(sorted((ranks.rank, 3 - ranks.rank)))
    seconds = [
        one.group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for one in (ranks, pair)
    ]
    return seconds[0], seconds[1]


def test_subgroups_time_out_like_their_group(ranks: Callable[[int], Pool]) -> None:
    """Not after torch's default of half an hour."""
    for of_group, of_subgroup in ranks(4).run(_subgroup_timeout):
        assert of_group == of_subgroup < 1800
