"""Collectives in shared memory against their definitions: every operation, dtype and size, bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.collectives import communicator
from colrow.transport import SharedGroup, share_memory
from colrow.transport.group import DTYPES, REDUCTIONS
from tests.pool import Pool
from tests.transport.available import needs_shared_memory

pytestmark = needs_shared_memory

COUNTS = (0, 1, 63, 1000, 20_000, 70_001, 300_007)
"""Elements: none, fewer than ranks, one-shot, one chunk, and several chunks of whatever is not a multiple."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = tuple(dtype for dtype in DTYPES if not dtype.is_floating_point)


def group_of_all() -> SharedGroup:
    assert dist.group.WORLD is not None
    shared = share_memory(dist.group.WORLD)
    assert shared is not None
    return shared


def tensor_of(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """What a rank contributes, which every rank can work out."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(count, generator=generator, dtype=wide).to(dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    # random bits, through views: torch has few operators for the unsigned
    width = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (count * width,), dtype=torch.uint8, generator=generator).view(dtype)


def reduced(parts: Sequence[Tensor], reduction: str) -> Tensor:
    """In rank order; half precision in fp32, rounded once; whole numbers wrap around."""
    dtype = parts[0].dtype
    if dtype == torch.bool:
        stacked = torch.stack(list(parts))
        either, odd = stacked.any(0), stacked.sum(0) % 2 == 1
        return {"sum": either, "max": either, "bor": either, "bxor": odd}.get(reduction, stacked.all(0))
    unsigned = {torch.uint16: torch.int64, torch.uint32: torch.int64}
    if dtype == torch.uint64:
        return reduced_uint64(parts, reduction)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else unsigned.get(dtype, dtype)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sum": torch.add,
        "avg": torch.add,
        "product": torch.mul,
        "min": torch.minimum,
        "max": torch.maximum,
        "band": torch.bitwise_and,
        "bor": torch.bitwise_or,
        "bxor": torch.bitwise_xor,
    }
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = functions[reduction](total, part.to(wide))
    if reduction == "avg":
        total = total / len(parts)
    return total.to(dtype)


def reduced_uint64(parts: Sequence[Tensor], reduction: str) -> Tensor:
    """By Python's whole numbers, of a few elements: torch cannot compare them."""
    results = []
    for values in zip(*(part.tolist() for part in parts), strict=True):
        total = values[0]
        for value in values[1:]:
            total = {
                "sum": total + value,
                "product": total * value,
                "min": min(total, value),
                "max": max(total, value),
                "band": total & value,
                "bor": total | value,
                "bxor": total ^ value,
            }[reduction] % 2**64
        results.append(total)
    return torch.tensor(results, dtype=torch.uint64)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _reduce(count: int, dtype: torch.dtype, reductions: Sequence[str]) -> str:
    """Every reduction, in place and not; a checksum of the results."""
    shared = group_of_all()
    parts = [tensor_of(rank, count, dtype) for rank in range(shared.size)]
    checksum = hashlib.sha256()
    for reduction in reductions:
        expected = reduced(parts, reduction)
        source = parts[shared.rank].clone()
        result = torch.empty_like(source)
        shared.all_reduce(source, result, reduction)
        assert same_bits(result, expected), f"{reduction} of {count} {dtype} is wrong"
        assert same_bits(source, parts[shared.rank]), "the operand was changed"
        shared.all_reduce(source, source, reduction)
        assert same_bits(source, expected), f"{reduction} of {count} {dtype} in place is wrong"
        checksum.update(bytes(result.view(torch.uint8).tolist()) if count < 100_000 else b"")
    return checksum.hexdigest()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_of_all_sizes(ranks: Callable[[int], Pool], size: int, dtype: torch.dtype) -> None:
    for count in COUNTS:
        assert len(set(ranks(size).run(_reduce, count, dtype, ["sum"]))) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_reduction_of_every_dtype(ranks: Callable[[int], Pool], dtype: torch.dtype) -> None:
    possible = [one for one in REDUCTIONS if SharedGroup.can_reduce(dtype, one)]
    assert "sum" in possible
    assert ("avg" in possible) == dtype.is_floating_point
    for count in (77, 1000 if dtype == torch.uint64 else 70_001):
        assert len(set(ranks(3).run(_reduce, count, dtype, possible))) == 1


def test_more_than_the_caches_hold(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_reduce, 2_500_001, torch.float32, ["sum"])
    ranks(2).run(_reduce, 4_300_001, torch.bfloat16, ["sum", "max"])


def _anywhere(dtype: torch.dtype) -> None:
    """Tensors that begin at any element: sums of several numbers at a time need no more of an address."""
    shared = group_of_all()
    for count in (1, 2, 33, 1001):
        parts = [tensor_of(rank, count + 3, dtype) for rank in range(shared.size)]
        for first, last in ((0, 1), (1, 0), (1, 1), (1, 3)):
            expected = reduced([part[first : first + count] for part in parts], "sum")
            own = parts[shared.rank].clone()
            result = torch.empty_like(own)[last : last + count]
            shared.all_reduce(own[first : first + count], result)
            assert same_bits(result, expected)
            shared.all_reduce(own[first : first + count], own[first : first + count])
            assert same_bits(own[first : first + count], expected)
            others = torch.ones_like(own, dtype=torch.bool)
            others[first : first + count] = False
            assert same_bits(own[others], parts[shared.rank][others]), "written beyond the tensor"


@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_that_begin_anywhere(ranks: Callable[[int], Pool], dtype: torch.dtype) -> None:
    ranks(2).run(_anywhere, dtype)


def _special(dtype: torch.dtype) -> None:
    """All numbers of 16 bits, with themselves and in another order: infinite ones, tiny ones and NaN too."""
    shared = group_of_all()
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    shuffled = every[torch.randperm(65536, generator=torch.Generator().manual_seed(3))]
    own = every if shared.rank == 0 else shuffled
    for reduction, function in (("sum", torch.add), ("max", torch.maximum), ("min", torch.minimum)):
        result = torch.empty_like(own)
        shared.all_reduce(own.clone(), result, reduction)
        expected = function(every.float(), shuffled.float()).to(dtype)
        assert torch.equal(result.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        difference = (result != expected) & numbers
        assert not difference.any(), (reduction, every[difference][:5], shuffled[difference][:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_numbers_of_half_precision(ranks: Callable[[int], Pool], dtype: torch.dtype) -> None:
    ranks(2).run(_special, dtype)


def _complex() -> None:
    shared = group_of_all()
    for dtype in (torch.complex64, torch.complex128):
        parts = [tensor_of(rank, 999, dtype) for rank in range(shared.size)]
        result = torch.empty_like(parts[0])
        shared.all_reduce(parts[shared.rank], result)
        assert torch.equal(result, reduced(parts, "sum"))
        own = torch.empty(333, dtype=dtype)
        counts = [0] * shared.size
        counts[-1], counts[0] = 666, 333
        own = torch.empty(counts[shared.rank], dtype=dtype)
        shared.reduce_scatter(parts[shared.rank], own, tuple(counts))
        start = sum(counts[: shared.rank])
        assert torch.equal(own, result[start : start + counts[shared.rank]])
        # a view that is not conjugated before it is read
        everybody = communicator(dist.group.WORLD)
        turned = [part.view(333, 3).conj() for part in parts]
        taken = everybody.start_all_to_all(turned[shared.rank], 0, [111] * 3, 1, [3] * 3).wait()
        expected = torch.cat([part[111 * shared.rank :][:111] for part in turned], 1)
        assert torch.equal(taken.resolve_conj(), expected.resolve_conj())


def test_complex_numbers(ranks: Callable[[int], Pool]) -> None:
    ranks(3).run(_complex)


def _moves(count: int, dtype: torch.dtype, seed: int) -> None:
    """Everything that moves data, with equal and random unequal parts."""
    shared = group_of_all()
    size, own = shared.size, shared.rank
    draw = random.Random(seed)
    parts = [tensor_of(rank, count, dtype, seed) for rank in range(size)]
    mine = parts[own]

    whole = mine.new_empty(count * size)
    shared.all_gather(mine, whole)
    assert torch.equal(whole, torch.cat(parts))
    whole[: own * count], whole[(own + 1) * count :] = 0, 0
    shared.all_gather(whole[own * count : (own + 1) * count], whole)  # in its place already
    assert torch.equal(whole, torch.cat(parts))

    counts = tuple(draw.choice((0, draw.randint(0, count))) for _ in range(size))
    whole = mine.new_empty(sum(counts))
    shared.all_gather(mine[: counts[own]].clone(), whole, counts)
    assert torch.equal(whole, torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]))

    for source in range(size):
        tensor = mine.clone()
        shared.broadcast(tensor, source)
        assert torch.equal(tensor, parts[source])

    total = reduced(parts, "sum")
    borders = [0, *sorted(draw.randint(0, count) for _ in range(size - 1)), count]
    counts = tuple(end - begin for begin, end in itertools.pairwise(borders))
    result = mine.new_empty(counts[own])
    shared.reduce_scatter(mine, result, counts)
    assert torch.equal(result, total[borders[own] : borders[own + 1]])

    even = count // size
    result = mine.new_empty(even)
    shared.reduce_scatter(mine[: even * size].clone(), result)
    assert torch.equal(result, total[own * even : (own + 1) * even])

    for destination in range(size):
        result = torch.empty_like(mine)
        shared.reduce(mine, result, destination)
        assert own != destination or torch.equal(result, total)

    received = mine.new_empty(even * size)
    shared.all_to_all(mine[: even * size].clone(), received)
    assert torch.equal(received, torch.cat([part[own * even : (own + 1) * even] for part in parts]))

    given = [[draw.choice((0, draw.randint(0, even))) for _ in range(size)] for _ in range(size)]
    taken = [row[own] for row in given]
    received = mine.new_empty(sum(taken))
    shared.all_to_all(mine[: sum(given[own])].clone(), received, given[own], taken)
    expected = [part[sum(row[:own]) : sum(row[: own + 1])] for part, row in zip(parts, given, strict=True)]
    assert torch.equal(received, torch.cat(expected))
    shared.barrier()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_everything_that_moves_data(ranks: Callable[[int], Pool], size: int) -> None:
    for seed, count in enumerate(COUNTS):
        ranks(size).run(_moves, count, torch.float64, seed)
    ranks(size).run(_moves, 70_001, torch.int8, 100)


def _storm(seed: int, rounds: int) -> int:
    """Operations of all kinds and sizes right after each other: slots are used again while others lag."""
    shared = group_of_all()
    size, own = shared.size, shared.rank
    draw = random.Random(seed)
    for number in range(rounds):
        count = draw.choice((1, 50, 5000, 16_384, 40_000, 150_000))
        kind = draw.choice(("reduce", "gather", "scatter", "exchange", "broadcast", "barrier"))
        base = float(draw.randint(1, 100))
        mine = torch.full((count,), base + own)
        total = size * base + size * (size - 1) / 2
        if kind == "reduce":
            shared.all_reduce(mine, mine)
            passed = bool((mine == total).all())
        elif kind == "gather":
            whole = torch.empty(count * size)
            shared.all_gather(mine, whole)
            passed = torch.equal(whole, (base + torch.arange(size)).repeat_interleave(count))
        elif kind == "scatter":
            result = torch.empty(count)
            shared.reduce_scatter(mine.repeat(size), result)
            passed = bool((result == total).all())
        elif kind == "exchange":
            whole = torch.empty(count * size)
            shared.all_to_all(mine.repeat(size), whole)
            passed = torch.equal(whole, (base + torch.arange(size)).repeat_interleave(count))
        elif kind == "broadcast":
            source = draw.randrange(size)
            shared.broadcast(mine, source)
            passed = bool((mine == base + source).all())
        else:
            shared.barrier()
            passed = True
        assert passed, f"operation {number}, {kind} of {count}, is wrong"
    return rounds


@pytest.mark.parametrize("size", [2, 3])
def test_a_storm_of_operations(ranks: Callable[[int], Pool], size: int) -> None:
    assert ranks(size).run(_storm, size, 400) == [400] * size


def _own_job(job: int) -> int:
    """Sums and exchanges of one job; the numbers of another would show."""
    group = group_of_all()
    mistakes = 0
    for step in range(1500):
        mine = torch.full((1 + step % 300,), float(1000 * job + group.rank + step), dtype=torch.float64)
        found = torch.empty_like(mine)
        group.all_reduce(mine, found)
        expected = group.size * (1000 * job + step) + sum(range(group.size))
        mistakes += int((found != expected).sum())
    return mistakes


def test_two_jobs_on_one_host_never_meet() -> None:
    jobs = [Pool(2), Pool(2)]
    try:
        with ThreadPoolExecutor() as both:
            found = list(both.map(lambda job: jobs[job].run(_own_job, job), range(2)))
    finally:
        for one in jobs:
            one.close()
    assert found == [[0, 0], [0, 0]]
