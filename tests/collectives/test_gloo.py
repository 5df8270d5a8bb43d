"""Collectives through gloo, as between hosts, where they are not gloo's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.apply.sequence import ScatterSequence, SequenceLength
from colrow.collectives import Communicator, all_reduce_of, communicator, network, reduce_scatter_of
from colrow.layers import row_parallel
from colrow.layout import Cut
from tests.pool import Pool
from tests.transport.hosts import on_hosts

SIZES = {2: ((3, 2), (5, 0)), 3: ((2, 2, 1), (0, 5, 0)), 4: ((1, 1, 1, 2), (0, 3, 0, 2))}
"""Extents of a dimension of five on each rank."""


def through_gloo(hosts: Sequence[int] = (0,) * 4, slow: float = float("inf")) -> Communicator:
    """All ranks, who do not use the memory that they share: a group decides when it is first used.

    Args:
        hosts: on which host each rank says that it is.
        slow: bytes per second, below which a network is.
    """
    with pytest.MonkeyPatch.context() as environment, on_hosts(hosts):
        environment.setenv("COLROW_TRANSPORT", "gloo")
        environment.setattr(network, "SLOW_BYTES_PER_SECOND", slow)
        ranks = communicator(dist.new_group(backend="gloo"))
        assert not ranks.overlaps
        ranks.barrier()
    assert ranks._shared is None
    assert ranks.overlaps is (len(set(hosts[: ranks.size])) > 1 and slow > 1e6)
    return ranks


def parts_of(ranks: Communicator, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """What each rank contributes, which every rank can work out."""
    generator = torch.Generator().manual_seed(ranks.size)
    return [(torch.randn(shape, generator=generator) * 100).to(dtype) for _ in range(ranks.size)]


def in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _reduce_scatter() -> None:
    ranks = through_gloo()
    for dtype in (torch.float64, torch.float32, torch.int64):
        for dimension, shape in enumerate([(5, 4), (4, 5), (2, 3, 5)]):
            parts = parts_of(ranks, shape, dtype)
            mine = parts[ranks.rank].clone()
            for operand in (mine, mine.mT.contiguous().mT):
                for sizes in SIZES[ranks.size]:
                    part = ranks.reduce_scatter(operand, dimension, sizes)
                    expected = in_order(parts).split(sizes, dimension)[ranks.rank]
                    assert part.is_contiguous()
                    assert torch.equal(part, expected)
                    assert torch.equal(operand, parts[ranks.rank])
    assert ranks.reduce_scatter(torch.ones(2, 0), 0, [2, *[0] * (ranks.size - 1)]).numel() == 0
    assert ranks.reduce_scatter(torch.ones(2 * ranks.size), 0).tolist() == [ranks.size] * 2


@contextmanager
def _noting(operation: str, events: list[object]) -> Iterator[None]:
    """Each time a collective of torch's begins, ``events`` gets ``"begin"``."""
    begin = getattr(dist, operation)

    def begun(*arguments: Any, **options: Any) -> object:
        events.append("begin")
        return begin(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, operation, begun)
        yield


def _in_chunks(hosts: Sequence[int], shape: tuple[int, ...], chunks: list[int]) -> None:
    """Each chunk's reduction begins before the next chunk is computed."""
    ranks = through_gloo(hosts)
    parts = parts_of(ranks, shape, torch.float64)
    x = parts[ranks.rank]
    events: list[object] = []

    def compute(rows: Tensor) -> Tensor:
        events.append(rows.shape[:-1].numel())
        return rows @ torch.ones(shape[-1], 600, dtype=rows.dtype)

    with _noting("all_reduce", events):
        found = all_reduce_of(ranks, x, 600, compute, "sum")
    assert events == [event for chunk in chunks for event in (chunk, "begin")]
    exact = in_order(parts).sum(-1, keepdim=True).expand(*shape[:-1], 600)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-9)
    assert found.is_contiguous()
    tally = ranks.statistics.where(label="sum")
    assert (tally.count, tally.bytes) == (1, found.numel() * found.element_size())
    everybodys = ranks.all_gather(found.unsqueeze(0), 0)
    assert all(torch.equal(one, found) for one in everybodys)


def _of_a_fast_network() -> None:
    assert not through_gloo(range(4), slow=1.0).overlaps


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_begun_before_all_is_computed(ranks: Callable[[int], Pool], size: int) -> None:
    hosts = [0, 0, 1][-size:]
    ranks(size).run(_in_chunks, hosts, (2, 151, 3), [76, 76, 76, 74])
    ranks(size).run(_in_chunks, hosts, (257, 1), [65, 65, 65, 62])
    ranks(size).run(_in_chunks, hosts, (200, 2), [200])  # few rows
    ranks(size).run(_in_chunks, hosts, (0, 2), [0])
    ranks(size).run(_in_chunks, [1] * size, (2, 151, 3), [302])  # on one host
    ranks(size).run(_of_a_fast_network)


def _row_parallel(features: int) -> None:
    ranks = through_gloo(range(4))
    torch.manual_seed(0)
    whole = torch.nn.Linear(features, 530).double()
    layer = row_parallel(copy.deepcopy(whole), ranks)
    cut = Cut.balanced(features, ranks.size)
    own = slice(cut.start(ranks.rank), cut.stop(ranks.rank))
    x = torch.randn(3, 100, features, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(3, 100, 530, dtype=torch.float64)
    exact, found = whole(x), layer(x[..., own])
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    names = [x, *whole.parameters()]
    of_x, of_weight, of_bias = torch.autograd.grad(exact, names, cotangent)
    mine = torch.autograd.grad(found, [x, *layer.parameters()], cotangent)
    expected = (torch.zeros_like(of_x), of_weight[:, own], of_bias)
    expected[0][..., own] = of_x[..., own]
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_a_layer_whose_result_is_summed_in_chunks(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_row_parallel, 7)
    ranks(size).run(_row_parallel, size - 1)  # one rank reads nothing


def _scattered(
    hosts: Sequence[int],
    shape: tuple[int, ...],
    dimension: int,
    dtype: torch.dtype,
    order: list[int],
) -> None:
    """What is for others is sent before this rank computes its own part."""
    ranks = through_gloo(hosts)
    parts = parts_of(ranks, shape, dtype)
    sizes = Cut.balanced(shape[dimension], ranks.size).counts
    events: list[object] = []

    def compute(rows: Tensor) -> Tensor:
        events.append(rows.shape[dimension])
        return rows @ torch.ones(shape[-1], 2100, dtype=rows.dtype)

    with _noting("all_to_all_single", events):
        found = reduce_scatter_of(ranks, parts[ranks.rank], 2100, compute, dimension, sizes, "sum")
    *others, own = [sizes[(ranks.rank + step) % ranks.size] for step in order] or [sum(sizes)]
    assert events == (
        [one for size in others for one in (size, "begin")] + [own] if order else [own, "begin"]
    )
    exact = in_order([part.double().sum(-1, keepdim=True) for part in parts])
    expected = exact.split(sizes, dimension)[ranks.rank].expand(*found.shape[:-1], 2100)
    tolerance = 1e-9 if dtype == torch.float64 else 3.0  # of numbers to 300, which bf16 rounds to 2
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    assert found.is_contiguous()
    tally = ranks.statistics.where(label="sum")
    whole = torch.Size(shape[:-1]).numel() * 2100 * found.element_size()
    assert (tally.count, tally.bytes) == (1, whole)


@pytest.mark.parametrize("size", [2, 3])
def test_parts_are_sent_before_all_is_computed(ranks: Callable[[int], Pool], size: int) -> None:
    hosts = [0, 0, 1][-size:]
    order = [*range(1, size), 0]
    ranks(size).run(_scattered, hosts, (2, 151, 3), 1, torch.float64, order)
    ranks(size).run(_scattered, hosts, (257, 1), 0, torch.bfloat16, order)
    ranks(size).run(_scattered, hosts, (300, 1, 2), 1, torch.float64, [])  # a rank has no token
    ranks(size).run(_scattered, hosts, (200, 2), 0, torch.float64, [])  # few rows


def _row_parallel_along_a_sequence(features: int, tokens: int) -> None:
    ranks = through_gloo(range(4))
    torch.manual_seed(0)
    whole = torch.nn.Linear(features, 530).double()
    scatter = ScatterSequence(SequenceLength(ranks, "sequence"), "exit", 1)
    layer = row_parallel(copy.deepcopy(whole), ranks, scatter=scatter)
    cut, sequence = Cut.balanced(features, ranks.size), Cut.balanced(tokens, ranks.size)
    own = slice(cut.start(ranks.rank), cut.stop(ranks.rank))
    part = slice(sequence.start(ranks.rank), sequence.stop(ranks.rank))
    x = torch.randn(3, tokens, features, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(3, tokens, 530, dtype=torch.float64)
    exact, found = whole(x), layer(x[..., own])
    assert "RowScatter" in str(found.grad_fn.next_functions)  # before the bias is added
    torch.testing.assert_close(found, exact[:, part], rtol=1e-12, atol=1e-12)
    of_x, of_weight = torch.autograd.grad(exact, [x, whole.weight], cotangent)
    mine = torch.autograd.grad(found, [x, layer.weight], cotangent[:, part])
    expected = (torch.zeros_like(of_x), of_weight[:, own])
    expected[0][..., own] = of_x[..., own]
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_a_layer_whose_result_is_scattered_in_parts(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_row_parallel_along_a_sequence, 7, 101)
    ranks(size).run(_row_parallel_along_a_sequence, size - 1, 100)  # one rank reads nothing


def _rounded_once() -> None:
    ranks = through_gloo()
    for dtype in (torch.bfloat16, torch.float16):
        parts = parts_of(ranks, (9, ranks.size), dtype)
        exact = in_order([part.float() for part in parts]).to(dtype)
        assert torch.equal(ranks.reduce_scatter(parts[ranks.rank], 1), exact[:, ranks.rank : ranks.rank + 1])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_of_parts(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_reduce_scatter)


@pytest.mark.parametrize("size", [2, 3])
def test_half_precision_is_rounded_once(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_rounded_once)
