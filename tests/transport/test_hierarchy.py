"""Ranks on several hosts: every collective against its definition, on all ranks the same bits."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.collectives import communicator
from colrow.transport import HierarchicalGroup, SharedGroup, agreement, share_memory
from colrow.transport.across import CALL_BYTES, even_parts, message_bytes
from colrow.transport.agreement import LEAST_RANKS_PER_HOST
from colrow.transport.c10d import SharedMemoryProcessGroup
from colrow.transport.group import DTYPES, REDUCTIONS
from colrow.transport.hierarchy import SLICE_BYTES
from tests.pool import Pool
from tests.transport.available import needs_shared_memory
from tests.transport.hosts import group_on, on_hosts
from tests.transport.test_group import reduced, same_bits, tensor_of

pytestmark = needs_shared_memory

HOSTS = ((0, 0, 1), (0, 1, 0), (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (1, 2, 2, 3))
"""On which host each rank is: equally many on each or not, one after the other or dealt out."""
LONG = ((0, 1, 0), (0, 0, 1, 1))
"""Those of which another is harder."""
INLINE = (message_bytes(2) - CALL_BYTES) // 8
COUNTS = (0, 1, 5, INLINE, INLINE + 1, 30_000, SLICE_BYTES // 8 + 7)
"""Float64 elements: fewer than ranks, with the first message and not, one slice, several."""


def _exact(hosts: tuple[int, ...], count: int) -> str:
    """Float64: every collective, with random parts; a checksum of the sums."""
    shared = group_on(hosts)
    size, rank = shared.size, shared.rank
    parts = [tensor_of(one, count, torch.float64, seed=count) for one in range(size)]
    own, total = parts[rank].clone(), sum(parts[1:], parts[0])
    result = torch.empty_like(own)
    shared.all_reduce(own, result)
    torch.testing.assert_close(result, total, rtol=1e-13, atol=1e-13)
    assert torch.equal(own, parts[rank]), "the operand was changed"
    shared.all_reduce(own, own)
    assert same_bits(own, result), "another result in place"
    draw = random.Random(count)
    for sizes in (
        even_parts(count, size),
        _cut(draw, count, size),
        _all_to(draw.randrange(size), count, size),
    ):
        part = torch.empty(sizes[rank], dtype=torch.float64)
        shared.reduce_scatter(parts[rank], part, tuple(sizes))
        torch.testing.assert_close(part, total.split(sizes)[rank], rtol=1e-13, atol=1e-13)
        held = [one[:length] for one, length in zip(parts, sizes, strict=True)]
        gathered = torch.empty(count, dtype=torch.float64)
        shared.all_gather(held[rank], gathered, tuple(sizes))
        assert torch.equal(gathered, torch.cat(held))
        in_place = torch.zeros(count, dtype=torch.float64)
        place = in_place.split(sizes)[rank]
        place.copy_(held[rank])
        shared.all_gather(place, in_place, tuple(sizes))
        assert torch.equal(in_place, gathered)
    for source in range(size):
        tensor = parts[rank].clone()
        shared.broadcast(tensor, source)
        assert torch.equal(tensor, parts[source])
        reached = torch.empty_like(tensor)
        shared.reduce(parts[rank], reached, source)
        if rank == source:
            torch.testing.assert_close(reached, total, rtol=1e-13, atol=1e-13)
    shared.barrier()
    return hashlib.sha256(bytes(result.view(torch.uint8).tolist())).hexdigest()


def _cut(draw: random.Random, count: int, parts: int) -> list[int]:
    borders = [0, *sorted(draw.randint(0, count) for _ in range(parts - 1)), count]
    return [end - begin for begin, end in itertools.pairwise(borders)]


def _all_to(rank: int, count: int, parts: int) -> list[int]:
    return [count if one == rank else 0 for one in range(parts)]


@pytest.mark.parametrize(
    "hosts", [pytest.param(one, marks=[pytest.mark.slow] if one in LONG else []) for one in HOSTS]
)
def test_every_collective(ranks: Callable[[int], Pool], hosts: tuple[int, ...]) -> None:
    for count in COUNTS:
        checksums = ranks(len(hosts)).run(_exact, hosts, count)
        assert len(set(checksums)) == 1, "ranks got different bits"
        assert ranks(len(hosts)).run(_exact, hosts, count) == checksums, "another run gave other bits"


def _every_dtype(hosts: tuple[int, ...]) -> list[str]:
    """Whole numbers, so that no order of summing matters; NaN and halves apart."""
    shared = group_on(hosts)
    checked = []
    for dtype in DTYPES:
        for reduction in REDUCTIONS:
            if not shared.can_reduce(dtype, reduction):
                continue
            for count in (77, 5000):
                parts = [_small(rank, count, dtype) for rank in range(shared.size)]
                result = torch.empty_like(parts[0])
                shared.all_reduce(parts[shared.rank], result, reduction)
                assert same_bits(result, reduced(parts, reduction)), f"{reduction} of {count} {dtype}"
                part = torch.empty_like(result.split(even_parts(count, shared.size))[shared.rank])
                shared.reduce_scatter(
                    parts[shared.rank], part, tuple(even_parts(count, shared.size)), reduction
                )
                assert same_bits(
                    part.clone(), result.split(even_parts(count, shared.size))[shared.rank].clone()
                )
            checked.append(f"{reduction} {dtype}")
    return checked


def _small(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.randint(-4, 5, (count,), generator=torch.Generator().manual_seed(rank)).to(dtype)
    return tensor_of(rank, count, dtype)


def test_every_reduction_of_every_dtype(ranks: Callable[[int], Pool]) -> None:
    checked = ranks(3).run(_every_dtype, (0, 1, 0))[0]
    possible = [
        f"{one} {dtype}" for dtype in DTYPES for one in REDUCTIONS if SharedGroup.can_reduce(dtype, one)
    ]
    unsigned = [f"{one} torch.uint{bits}" for one in ("min", "max") for bits in (16, 32, 64)]
    assert sorted(checked) == sorted(set(possible) - set(unsigned))


def _rounded_once() -> None:
    """1 + 3 * 2^-9: each small term alone is lost in bfloat16, their sum is not."""
    shared = group_on((0, 0, 1, 1))
    for count in (4, 20_000):
        own = torch.full((count,), 1.0 if shared.rank == 0 else 2.0**-9).bfloat16()
        shared.all_reduce(own, own)
        assert torch.equal(own, torch.full((count,), 1 + 3 * 2.0**-9).bfloat16())
        own = torch.full((count,), float("nan") if shared.rank == 3 else 1.0)
        shared.all_reduce(own, own, "max")
        assert own.isnan().all()
    pair = torch.tensor([1 + 2j, 3j]) * (shared.rank + 1)
    shared.all_reduce(pair, pair)
    assert torch.equal(pair, torch.tensor([1 + 2j, 3j]) * 10)


def test_half_precision_nan_and_complex_numbers(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_rounded_once)


def _torch_and_colrow(hosts: tuple[int, ...]) -> None:
    """Calls of torch.distributed on the backend, and colrow's own, whose groups are on several hosts."""
    with on_hosts(hosts):
        group = dist.new_group(backend="shm")
        assert isinstance(group, SharedMemoryProcessGroup)
        memory = group.shared_memory()
    assert isinstance(memory, HierarchicalGroup)
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = [tensor_of(one, 24, torch.float64).view(4, 6) for one in range(size)]
    tensor = parts[rank].clone()
    dist.all_reduce(tensor, dist.ReduceOp.AVG, group=group)
    torch.testing.assert_close(tensor, sum(parts[1:], parts[0]) / size)
    listed = [torch.empty(4, 6, dtype=torch.float64) for _ in range(size)]
    dist.all_gather(listed, parts[rank], group=group)
    assert torch.equal(torch.stack(listed), torch.stack(parts))
    rows = torch.cat([torch.full((rank + 1, 2), 10.0 * rank + to) for to in range(size)])
    received = torch.empty(sum(range(1, size + 1)), 2)
    sent = [rank + 1] * size
    dist.all_to_all_single(received, rows, list(range(1, size + 1)), sent, group=group)
    expected = [torch.full((sender + 1, 2), 10.0 * sender + rank) for sender in range(size)]
    assert torch.equal(received, torch.cat(expected))
    dist.barrier(group)
    ranks = communicator(group)
    whole = [part.t() for part in parts]
    found = ranks.reduce_scatter(whole[rank], 0, [0, 1, 5][:size])
    torch.testing.assert_close(found, sum(whole[1:], whole[0]).split([0, 1, 5])[rank])
    shards = [part[:, : one + 1] for one, part in enumerate(parts)]
    assert torch.equal(ranks.all_gather(shards[rank], 1, [1, 2, 3]), torch.cat(shards, 1))
    assert torch.equal(ranks.broadcast(whole[rank], 1), whole[1])
    everything = ranks.gather(shards[rank], [[4, 1], [4, 2], [4, 3]])
    assert all(torch.equal(*both) for both in zip(everything, shards, strict=False))
    assert len(everything) == (3 if rank == 0 else 0)


def test_through_torch_and_colrow(ranks: Callable[[int], Pool]) -> None:
    ranks(3).run(_torch_and_colrow, (0, 1, 0))


def _few_ranks_per_host(hosts: tuple[int, ...]) -> bool:
    group = dist.new_group(backend="gloo")
    with on_hosts(hosts), pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "LEAST_RANKS_PER_HOST", LEAST_RANKS_PER_HOST)
        return share_memory(group) is None


def test_few_ranks_on_each_host_are_gloos(ranks: Callable[[int], Pool]) -> None:
    assert all(ranks(2).run(_few_ranks_per_host, (0, 1)))
    assert all(ranks(3).run(_few_ranks_per_host, (0, 1, 1)))
    assert not any(ranks(4).run(_few_ranks_per_host, (0, 1, 1, 1)))
