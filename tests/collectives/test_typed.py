"""Typed collectives against the plain mathematics: values, first and second derivatives, counts and bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import colrow
from colrow import collectives
from colrow.collectives import communicator
from colrow.layout import Cut
from tests.pool import Pool, worker_mesh

SIZES = [1, 2, 3, 4]


def _parts(size: int, extent: int = 7) -> list[int]:
    return list(Cut.balanced(extent, size).counts)


def _random(*shape: int, seed: int, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def _everything(size: int) -> None:
    """Each collective against its definition; cotangents are random, so that no order can hide."""
    mesh = worker_mesh(size)
    rank = communicator(mesh).rank
    own = [_random(5, 7, seed=rank_) for rank_ in range(size)]  # what each rank contributes
    sizes = _parts(size)
    slices = list(torch.arange(7).split(sizes))

    # enter: I -> R. Value unchanged, gradient is the sum of all ranks' cotangents.
    x = _random(5, 7, seed=100, grad=True)
    cotangents = [_random(5, 7, seed=200 + rank_) for rank_ in range(size)]
    y = collectives.enter(x, mesh)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad((y * cotangents[rank]).sum(), x)
    torch.testing.assert_close(gradient, sum(cotangents), rtol=0, atol=1e-12)

    # all_reduce: P -> I passes the gradient, P -> R sums it.
    for dst in ("I", "R"):
        x = own[rank].clone().requires_grad_()
        y = collectives.all_reduce(x, mesh, dst=dst)  # type: ignore[arg-type]
        torch.testing.assert_close(y, sum(own), rtol=0, atol=1e-12)
        (gradient,) = torch.autograd.grad((y * cotangents[rank]).sum(), x)
        expected = cotangents[rank] if dst == "I" else sum(cotangents)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)

    for dimension in (1, -1, 0):
        whole = _random(5, 7, seed=300) if dimension else _random(7, 5, seed=300)
        pieces = [whole.index_select(dimension, index) for index in slices]
        cotangents = [_random(*whole.shape, seed=400 + rank_) for rank_ in range(size)]

        # all_gather: V -> R sums the slices of the gradients, V -> I takes the own slice of the own gradient.
        for dst in ("R", "I"):
            x = pieces[rank].clone().requires_grad_()
            y = collectives.all_gather(x, mesh, dimension, sizes=sizes, dst=dst)  # type: ignore[arg-type]
            assert torch.equal(y, whole)
            (gradient,) = torch.autograd.grad((y * cotangents[rank]).sum(), x)
            full = sum(cotangents) if dst == "R" else cotangents[rank]
            expected = full.index_select(dimension, slices[rank])  # type: ignore[union-attr]
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)

        # reduce_scatter: P -> V; the gradient is gathered.
        contributions = [_random(*whole.shape, seed=500 + rank_) for rank_ in range(size)]
        x = contributions[rank].clone().requires_grad_()
        y = collectives.reduce_scatter(x, mesh, dimension, sizes=sizes)
        expected = sum(contributions).index_select(dimension, slices[rank])  # type: ignore[union-attr]
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        (gradient,) = torch.autograd.grad((y * pieces[rank]).sum(), x)
        torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-12)

        # slice: R -> V pads the gradient with zeros, I -> V gathers it.
        for src in ("R", "I"):
            x = whole.clone().requires_grad_()
            y = collectives.slice_local(x, mesh, dimension, sizes=sizes, src=src)  # type: ignore[arg-type]
            assert torch.equal(y, pieces[rank])
            (gradient,) = torch.autograd.grad((y * pieces[rank]).sum(), x)
            padded = torch.zeros_like(whole).index_copy(dimension, slices[rank], pieces[rank])
            assert torch.equal(gradient, whole if src == "I" else padded)

    # first_rank_only: a value counted once in a sum; I -> P passes the gradient on every rank.
    bias = _random(7, seed=600, grad=True)
    y = collectives.all_reduce(collectives.first_rank_only(bias, mesh), mesh)
    assert torch.equal(y, bias)
    (gradient,) = torch.autograd.grad((y * own[0][0]).sum(), bias)
    assert torch.equal(gradient, own[0][0])
    y = collectives.first_rank_only(bias, mesh, src="R")
    (gradient,) = torch.autograd.grad((y * own[0][0]).sum(), bias)
    assert torch.equal(gradient, own[0][0] if rank == 0 else torch.zeros(7, dtype=torch.float64))

    # all_to_all: from cut rows to cut columns; the gradient goes the other way.
    whole, rows = _random(5, 7, 2, seed=700), _parts(size, 5)
    row_slices = list(torch.arange(5).split(rows))
    x = whole.index_select(0, row_slices[rank]).requires_grad_()
    y = collectives.all_to_all(x, mesh, 1, 0, split_sizes=sizes, concat_sizes=rows)
    assert torch.equal(y, whole.index_select(1, slices[rank]))
    other = _random(5, 7, 2, seed=800)
    (gradient,) = torch.autograd.grad((y * other.index_select(1, slices[rank])).sum(), x)
    assert torch.equal(gradient, other.index_select(0, row_slices[rank]))


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_everything, size)


def _second_derivative(size: int) -> None:
    """f = sum_r (x_r-weighted cube of an entered value): Hessian-vector products need double backward."""
    mesh = worker_mesh(size)
    rank = communicator(mesh).rank
    x = _random(6, seed=1, grad=True)
    weights = [_random(6, seed=10 + rank_) for rank_ in range(size)]
    partial = weights[rank] * collectives.enter(x, mesh) ** 3
    loss = collectives.all_reduce(partial, mesh).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    direction = _random(6, seed=2)
    (second,) = torch.autograd.grad((first * direction).sum(), x)
    total = sum(weights)
    torch.testing.assert_close(first, 3 * total * x**2, rtol=0, atol=1e-12)
    torch.testing.assert_close(second, 6 * total * x * direction, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_second_derivatives(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_second_derivative, size)


def _asynchronous(size: int) -> None:
    mesh = worker_mesh(size)
    rank = communicator(mesh).rank
    x = torch.full((4,), float(rank + 1), requires_grad=True)
    pending = collectives.all_reduce_async(x * 1, mesh, dst="R")
    gathering = collectives.all_gather_async(x * 2, mesh, 0)
    total = size * (size + 1) / 2
    y, z = pending.wait(), gathering.wait()
    assert pending.wait() is not None  # may be waited for again
    assert torch.equal(y, torch.full((4,), total))
    assert torch.equal(z, (torch.arange(size) + 1.0).repeat_interleave(4) * 2)
    (y * (rank + 1)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((4,), total))
    # reduce-scatter and all-to-all: the same results and gradients as the blocking forms
    splits, joins = {"sizes": _parts(size)}, {"split_sizes": _parts(size), "concat_sizes": _parts(size, 5)}
    cases: list[tuple[Any, Any, int]] = [
        (
            lambda value: collectives.reduce_scatter_async(value, mesh, 1, **splits).wait(),
            lambda value: collectives.reduce_scatter(value, mesh, 1, **splits),
            3,
        ),
        (
            lambda value: collectives.all_to_all_async(value, mesh, 1, 0, **joins).wait(),
            lambda value: collectives.all_to_all(value, mesh, 1, 0, **joins),
            _parts(size, 5)[rank],
        ),
    ]
    for started, blocking, rows in cases:
        results = []
        for function in (started, blocking):
            value = _random(rows, 7, seed=rank, grad=True)
            result = function(value)
            results.append((result, torch.autograd.grad((result * (rank + 1.0)).sum(), value)[0]))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("size", SIZES)
def test_asynchronous_forms(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_asynchronous, size)


# Silent errors of others, each of which had a wrong number and no message.


def _shared_gradient() -> None:
    """Two entries whose gradients are one tensor: reducing it in place would count it twice."""
    mesh = worker_mesh(2)
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    w = torch.ones(1)
    ((collectives.enter(a, mesh) + collectives.enter(b, mesh)) * w).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad.item(), b.grad.item()) == (2.0, 2.0)


def _entry_used_twice() -> None:
    mesh = worker_mesh(2)
    x = torch.ones(3, requires_grad=True)
    y = collectives.enter(x, mesh)
    (y.sum() + (2 * y).sum()).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [6.0] * 3
    assert colrow.comm_stats().count == 1


def _expanded_gradient() -> None:
    """``.sum().backward()`` hands over an expanded gradient; a transposed one is not contiguous."""
    mesh = worker_mesh(2)
    x = torch.ones(2, 3, requires_grad=True)
    collectives.enter(x, mesh).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))
    x.grad = None
    w = torch.arange(6.0).view(3, 2)
    (collectives.enter(x, mesh).t() * w).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * w.t())


def _exit_of_a_saved_tensor() -> None:
    """exp saves its result: an exit that reduced in place would change exp's gradient."""
    mesh = worker_mesh(2)
    x = torch.zeros(3, requires_grad=True)
    y = x.exp()
    z = collectives.all_reduce(y, mesh)
    assert y.tolist() == [1.0] * 3
    z.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0] * 3


def _non_contiguous_input() -> None:
    mesh = worker_mesh(2)
    x = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(collectives.all_reduce(x, mesh), 2 * x)
    expanded = torch.ones(1).expand(4)
    assert torch.equal(collectives.all_reduce(expanded, mesh), torch.full((4,), 2.0))
    assert torch.equal(expanded, torch.ones(4))


def _empty_parts() -> None:
    """A rank may hold nothing of an axis with fewer units than ranks."""
    mesh = worker_mesh(2)
    rank = communicator(mesh).rank
    x = torch.ones(3, 1 - rank, requires_grad=True)
    y = collectives.all_gather(x, mesh, 1, sizes=[1, 0])
    assert y.shape == (3, 1)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3, 1 - rank), 2.0))


@pytest.mark.parametrize(
    "case",
    [
        _shared_gradient,
        _entry_used_twice,
        _expanded_gradient,
        _exit_of_a_saved_tensor,
        _non_contiguous_input,
        _empty_parts,
    ],
)
def test_silent_errors_of_others(ranks: Callable[[int], Pool], case: Callable[[], None]) -> None:
    ranks(2).run(case)


def _subgroups() -> None:
    """Two tp groups in one job do not mix."""
    mesh = worker_mesh(tp=2, dp=2)
    tp, dp = communicator(mesh["tp"]), communicator(mesh["dp"])
    world = tp.global_ranks
    x = torch.tensor([float(torch.distributed.get_rank())], requires_grad=True)
    y = collectives.all_reduce(x, mesh)
    assert y.item() == sum(world)
    assert collectives.all_reduce(x, mesh["dp"]).item() == sum(dp.global_ranks)
    assert communicator(mesh) is tp


def test_subgroups_of_the_world(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_subgroups)


def _half_precision(dtype: torch.dtype) -> Tensor:
    """1 + 2^-9 + 2^-9 + 2^-9: each small term alone is lost in bfloat16, their sum is not."""
    mesh = worker_mesh(4)
    value = 1.0 if communicator(mesh).rank == 0 else 2.0**-9
    part = collectives.reduce_scatter(torch.full((4,), value, dtype=dtype), mesh, 0)
    total = collectives.all_reduce(torch.tensor([value], dtype=dtype), mesh)
    assert torch.equal(part, total)
    return total


def test_half_precision_is_summed_in_single(ranks: Callable[[int], Pool]) -> None:
    exact = torch.tensor([1 + 3 * 2.0**-9])
    for result in ranks(4).run(_half_precision, torch.bfloat16):
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, exact.to(torch.bfloat16))


def _statistics() -> dict[str, Any]:
    mesh = worker_mesh(2)
    x = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    y = collectives.enter(x, mesh, label="enter here")
    y = collectives.all_reduce(y, mesh, label="exit there")
    y.sum().backward()
    sizes = [3, 4]  # what is gathered counts, not the padding on the way
    collectives.all_gather(torch.zeros(sizes[communicator(mesh).rank]), mesh, 0, sizes=sizes, label="parts")
    stats = colrow.comm_stats(mesh)
    assert stats.seconds > 0
    assert "exit there" in str(stats)
    return {"/".join(key): (tally.count, tally.bytes) for key, tally in stats.tallies.items()}


def test_statistics_are_exact(ranks: Callable[[int], Pool]) -> None:
    for found in ranks(2).run(_statistics):
        assert found == {
            "all_reduce/exit there/forward": (1, 64),
            "all_reduce/enter here/backward": (1, 64),
            "all_gather/parts/forward": (1, 28),
        }


def _refused() -> list[str]:
    mesh = worker_mesh(2)
    messages = []
    for call in (
        lambda: collectives.reduce_scatter(torch.zeros(3), mesh, 0),
        lambda: collectives.all_gather(torch.zeros(3), mesh, 0, sizes=[3]),
        lambda: collectives.all_gather(torch.zeros(3), mesh, 0, sizes=[2, 2]),
        lambda: collectives.slice_local(torch.zeros(3), mesh, 0),
        lambda: collectives.reduce_scatter(torch.zeros(3), mesh, 0, sizes=[1, 1]),
        lambda: collectives.all_gather(torch.zeros(3, 2), mesh, 5),
        lambda: collectives.all_gather(torch.zeros(()), mesh, 0),
        lambda: collectives.all_to_all(torch.zeros(2), mesh, 0, -1, split_sizes=[1, 1], concat_sizes=[2, 2]),
    ):
        with pytest.raises((ValueError, IndexError)) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_bad_sizes_are_refused(ranks: Callable[[int], Pool]) -> None:
    for messages in ranks(2).run(_refused):
        assert "3 cannot be cut over 2 ranks equally" in messages[0]
        assert "sizes of 1 ranks for a group of 2" in messages[1]
        assert "holds 3, not 2" in messages[2]
        assert "give sizes" in messages[3]
        assert "do not add up" in messages[4]
        assert "no dimension 5" in messages[5]
        assert "no dimension 0" in messages[6]
        assert "parts of dimension 0 cannot be joined along it" in messages[7]
