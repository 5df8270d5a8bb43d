"""Parallel cross-entropy against ``F.cross_entropy``: every option, value, gradient and uneven cut."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import colrow
from colrow.collectives import communicator
from colrow.layers import cross_entropy
from colrow.layout import Cut
from tests.pool import Pool, worker_mesh

SIZES = [1, 2, 3, 4]


def _own(whole: Tensor, cut: Cut, rank: int) -> Tensor:
    return whole[..., cut.start(rank) : cut.stop(rank)].clone()


def _loss(is_compiled: bool) -> Callable[..., Tensor]:
    if not is_compiled:
        return cross_entropy
    torch._dynamo.reset()
    return torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")


def _options(size: int, vocabulary: int, is_compiled: bool) -> None:
    mesh = worker_mesh(size)
    rank = communicator(mesh).rank
    cut = Cut.balanced(vocabulary, size)
    generator = torch.Generator().manual_seed(vocabulary)
    whole = 5 * torch.randn(2, 9, vocabulary, dtype=torch.float64, generator=generator)
    given = torch.randint(vocabulary, (2, 9), generator=generator)
    weights = torch.rand(vocabulary, dtype=torch.float64, generator=generator)
    cotangent = torch.randn(2, 9, dtype=torch.float64, generator=generator)
    reductions = ("mean", "none") if is_compiled else ("mean", "sum", "none")
    for smoothing, weight, reduction in product((0.0, 0.1), (None, weights), reductions):
        options: dict[str, Any] = {"label_smoothing": smoothing, "weight": weight, "reduction": reduction}
        ignored = options["ignore_index"] = vocabulary // 2 if smoothing else -100  # one of the ids, too
        target = given.clone()
        target[0, 3] = target[1, 0] = ignored
        a = whole.clone().requires_grad_()
        b = _own(whole, cut, rank).requires_grad_()
        before = b.detach().clone()
        expected = F.cross_entropy(a.flatten(0, 1), target.flatten(), **options)
        found = _loss(is_compiled)(b, target, mesh, vocabulary=cut, **options)
        torch.testing.assert_close(found.flatten(), expected.flatten(), rtol=1e-12, atol=1e-12)
        factor = cotangent if reduction == "none" else cotangent[0, 0]
        (expected.view(found.shape) * factor).sum().backward()
        (found * factor).sum().backward()
        assert a.grad is not None
        torch.testing.assert_close(b.grad, _own(a.grad, cut, rank), rtol=1e-11, atol=1e-12)
        assert torch.equal(b.detach(), before)  # the caller's logits are untouched


@pytest.mark.parametrize("size", SIZES)
def test_all_options(ranks: Callable[[int], Pool], size: int) -> None:
    for vocabulary in (211, 3):  # with 3 ids, one of 4 ranks holds none
        ranks(size).run(_options, size, vocabulary, False)


@pytest.mark.slow
def test_all_options_compiled(ranks: Callable[[int], Pool]) -> None:
    ranks(3).run(_options, 3, 2, True)  # one rank holds no id


def _z_loss(size: int, is_compiled: bool) -> None:
    mesh = worker_mesh(size)
    rank = communicator(mesh).rank
    cut = Cut.weighted(17, [3, 1, 2, 1][:size])
    whole = torch.randn(5, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 16, -100, 7, 8])
    a, b = whole.clone().requires_grad_(), _own(whole, cut, rank).requires_grad_()
    squares = torch.logsumexp(a, 1) ** 2
    expected = F.cross_entropy(a, target) + 1e-2 * squares[target != -100].mean()
    found = _loss(is_compiled)(b, target, mesh, vocabulary=cut, z_loss=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected.backward()
    found.backward()
    assert a.grad is not None
    torch.testing.assert_close(b.grad, _own(a.grad, cut, rank), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("size", "is_compiled"), [*((size, False) for size in SIZES), (3, True)])
def test_z_loss_with_a_weighted_cut(ranks: Callable[[int], Pool], size: int, is_compiled: bool) -> None:
    ranks(size).run(_z_loss, size, is_compiled)


def _extremes(is_compiled: bool) -> None:
    """Large, infinite and equal logits; one rank far below the others; more tokens than one chunk."""
    cross_entropy = _loss(is_compiled)
    mesh = worker_mesh(2)
    rank = communicator(mesh).rank
    cut = Cut.balanced(6, 2)
    rows = torch.tensor(
        [
            [1e4, -1e4, 0, 0, 0, 1e4],
            [-1e30, -1e30, -1e30, 5, 5, 5],
            [-torch.inf, 1, 2, -torch.inf, 3, 4],
            [0, 0, 0, 0, 0, 0],
        ],
        dtype=torch.float64,
    )
    whole, target = rows.repeat(700, 1), torch.tensor([0, 4, 2, 5]).repeat(700)
    a, b = whole.clone().requires_grad_(), _own(whole, cut, rank).requires_grad_()
    expected, found = F.cross_entropy(a, target), cross_entropy(b, target, mesh, vocabulary=cut)
    assert torch.isfinite(found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected.backward()
    found.backward()
    assert a.grad is not None
    torch.testing.assert_close(b.grad, _own(a.grad, cut, rank), rtol=1e-11, atol=1e-15)
    # all targets ignored: not a number, as in torch; a number that is not finite in an ignored row is ignored
    ignored = torch.full((4,), -100)
    assert cross_entropy(_own(rows, cut, rank), ignored, mesh, vocabulary=cut).isnan()
    bad = rows.clone()
    bad[0] = torch.inf
    c = _own(bad, cut, rank).requires_grad_()
    loss = cross_entropy(c, torch.tensor([-100, 4, 2, 5]), mesh, vocabulary=cut)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(rows[1:], torch.tensor([4, 2, 5])))
    assert c.grad is not None
    assert c.grad[0].tolist() == [0.0] * 3


@pytest.mark.parametrize("is_compiled", [False, True])
def test_extremes(ranks: Callable[[int], Pool], is_compiled: bool) -> None:
    ranks(2).run(_extremes, is_compiled)


def _half_precision(dtype: torch.dtype) -> None:
    """Half-precision logits: the loss is computed in single precision and the gradient rounded once."""
    mesh = worker_mesh(2)
    rank = communicator(mesh).rank
    cut = Cut.balanced(211, 2)
    whole = torch.randn(30, 211, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.randint(211, (30,), generator=torch.Generator().manual_seed(1))
    a, b = whole.float().requires_grad_(), _own(whole, cut, rank).requires_grad_()
    expected, found = F.cross_entropy(a, target), cross_entropy(b, target, mesh, vocabulary=cut)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    found.backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(b.grad, _own(a.grad, cut, rank).to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(ranks: Callable[[int], Pool], dtype: torch.dtype) -> None:
    ranks(2).run(_half_precision, dtype)


def _counts_and_refusals() -> dict[str, tuple[int, int]]:
    mesh = worker_mesh(2)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 7, 3, 4, 1])
    loss = cross_entropy(logits, target, mesh, vocabulary=8)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)
    counted = {
        "/".join(key): (tally.count, tally.bytes) for key, tally in colrow.comm_stats(mesh).tallies.items()
    }
    for whole in (torch.int32, torch.uint8):
        assert torch.equal(cross_entropy(logits, target.to(whole), mesh, vocabulary=8), loss)
    for bad in (8, -1, 1000):
        with pytest.raises(IndexError, match=r"must be in \[0, 8\)"):
            cross_entropy(logits, torch.tensor([0, bad, 0, 0, 0]), mesh, vocabulary=8)
    with pytest.raises(ValueError, match="should hold the logits of 8 of 16 ids, got 4"):
        cross_entropy(logits, target, mesh, vocabulary=16)
    with pytest.raises(ValueError, match="do not fit the target"):
        cross_entropy(logits, target[:4], mesh, vocabulary=8)
    with pytest.raises(ValueError, match="label_smoothing"):
        cross_entropy(logits, target, mesh, vocabulary=8, label_smoothing=1.0)
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(logits, target, mesh, vocabulary=8, reduction="average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="probabilities"):
        cross_entropy(logits, torch.rand(5), mesh, vocabulary=8)
    with pytest.raises(ValueError, match=r"shape \[8\]"):
        cross_entropy(logits, target, mesh, vocabulary=8, weight=torch.ones(4))
    return counted


def test_counts_and_refusals(ranks: Callable[[int], Pool]) -> None:
    for counted in ranks(2).run(_counts_and_refusals):
        assert counted == {
            "all_reduce/cross-entropy max/forward": (1, 40),
            "all_reduce/cross-entropy sum/forward": (1, 80),
        }
