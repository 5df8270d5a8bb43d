"""Typed collectives inside torch.compile: one graph, and the values and gradients of eager mode."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Assume,
    Collective,
    Communicator,
    Enter,
    FirstRankOnly,
    Pad,
    ReduceScatter,
    Slice,
    communicator,
)
from colrow.layout import Cut
from tests.collectives import crew
from tests.pool import Pool, worker_mesh


def _cases(ranks: Communicator) -> list[tuple[Collective, tuple[int, ...]]]:
    """Every collective, equal and unequal sizes, and the shape of what it is given."""
    cases: list[tuple[Collective, tuple[int, ...]]] = [
        (Enter(ranks, "enter"), (2, 3)),
        (AllReduce(ranks, "exit"), (2, 3)),
        (AllReduce(ranks, "sum", "R"), (2, 3)),
        (FirstRankOnly(ranks, "first", "R"), (2, 3)),
        (FirstRankOnly(ranks, "first", "I"), (2, 3)),
        (Assume(ranks, "assume"), (2, 3)),
    ]
    even, odd = (2,) * ranks.size, Cut.balanced(7, ranks.size).counts
    rows = Cut.balanced(5, ranks.size).counts
    for sizes, given in ((even, None), (odd, odd)):
        own, whole = (3, sizes[ranks.rank], 2), (3, sum(sizes), 2)
        cases += [
            (AllGather(ranks, "gather", 1, given, "R"), own),
            (AllGather(ranks, "gather", -2, given, "I"), own),
            (ReduceScatter(ranks, "scatter", 1, given), whole),
            (Slice(ranks, "slice", 1, given, "R"), whole),
            (Slice(ranks, "slice", 1, given, "I"), whole),
            (Pad(ranks, "pad", 1, given), own),
            (AllToAll(ranks, "exchange", 1, sizes, 0, rows), (rows[ranks.rank], sum(sizes), 2)),
        ]
    return cases


class _Every(nn.Module):
    """All cases one after the other, each on a value of its own; gives their results and those values."""

    def __init__(self, cases: list[Collective], begins: bool) -> None:
        super().__init__()
        self.cases, self.begins = cases, begins

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        # transposed twice: what a collective is given need not be contiguous
        given = [(2 * x).transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
        if self.begins:
            pending = [case.begin(x) for case, x in zip(self.cases, given, strict=True)]
            return [one.wait() for one in pending] + given
        return [case(x) for case, x in zip(self.cases, given, strict=True)] + given


def _compare(size: int, backend: str, begins: bool) -> None:
    ranks = communicator(worker_mesh(size))
    cases = _cases(ranks)
    module = _Every([case for case, _ in cases], begins)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(ranks.rank)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    plain = [random(shape) for _, shape in cases]
    with torch.no_grad():
        for found, expected in zip(compiled(plain), module(plain), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    inputs = [x.clone().requires_grad_() for x in plain]
    expected, found = module(inputs), compiled(inputs)
    cotangents = [random(tuple(result.shape)) for result in expected]
    gradients = [torch.autograd.grad(results, inputs, cotangents) for results in (expected, found)]
    for result, other in zip(found, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=1e-12)
    for (case, _), wanted, gradient in zip(cases, *gradients, strict=True):
        error = (gradient - wanted).abs().max().item()
        assert error < 1e-12, f"gradient of {case} is off by {error}"


@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_values_and_gradients(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_compare, size, "aot_eager", False)


def test_eager_backend_and_asynchronous_forms(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_compare, 2, "eager", True)


def _failing(event: str) -> list[float] | None:
    """Seconds until the other rank's collective, within a graph, raised."""
    colrow.init_mesh(tp=2, timeout=30)
    mesh = colrow.init_mesh(tp=2, timeout=2)
    exit = AllReduce(communicator(mesh), "exit")
    compiled = torch.compile(lambda x: exit(2 * x), fullgraph=True, backend="aot_eager")
    x = torch.ones(100, requires_grad=True)
    compiled(x).sum().backward()
    communicator(mesh).barrier()
    if communicator(mesh).rank == 1:
        if event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        compiled(x)
    return [time.monotonic() - begin]


@pytest.mark.parametrize("event", ["kill", "hang"])
def test_a_failing_rank_ends_a_graph(ranks: Callable[[int], Pool], event: str) -> None:
    ranks(1)  # the pools' fork server runs
    ends = crew.run(_failing, event, size=2, stuck=(1,))
    assert ends[0].code == 0
    assert ends[0].result[0] < 4
