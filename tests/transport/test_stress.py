"""Random collectives in random groups, with random delays and kills: right or a RankFailure, never a hang."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import colrow
from colrow.collectives import Communicator, communicator
from tests.collectives import crew
from tests.pool import Pool
from tests.transport.available import needs_shared_memory

pytestmark = needs_shared_memory

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "gather", "torch")


@pytest.fixture(autouse=True)
def _server(ranks: Callable[[int], Pool]) -> None:
    """The pools' fork server runs."""
    ranks(1)


def _values(rank: int, number: int, count: int, dtype: torch.dtype) -> Tensor:
    """What a global rank contributes: whole numbers, so that sums are exact in every dtype."""
    return ((torch.arange(count) + 3 * rank + number) % 5).to(dtype)


def _cut(draw: random.Random, extent: int, parts: int) -> list[int]:
    borders = [0, *sorted(draw.randint(0, extent) for _ in range(parts - 1)), extent]
    return [end - begin for begin, end in itertools.pairwise(borders)]


def _one(kind: str, group: Communicator, number: int, draw: random.Random, delay: float) -> None:
    """One collective; ``draw`` is the same on all ranks of the job."""
    dtype = draw.choice(DTYPES)
    count = draw.choice((draw.randint(0, 100), draw.randint(0, 20_000), draw.randint(0, 300_000)))
    sizes, matrix = _cut(draw, count, group.size), [_cut(draw, 50, group.size) for _ in range(group.size)]
    source = draw.randrange(group.size)
    time.sleep(delay)
    parts = [_values(rank, number, count, dtype) for rank in group.global_ranks]
    mine, own = parts[group.rank], group.rank
    if kind == "all_reduce":
        found, expected = group.all_reduce(mine), sum(parts[1:], parts[0])
    elif kind == "all_gather":
        held = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        found, expected = group.all_gather(held[own], 0, sizes), torch.cat(held)
    elif kind == "reduce_scatter":
        found = group.reduce_scatter(mine, 0, sizes)
        expected = sum(parts[1:], parts[0]).split(sizes)[own]
    elif kind == "all_to_all":
        # rank i holds sum(matrix[i]) rows and gives matrix[i][j] of them to j: equal for all i here
        rows = matrix[0]
        whole = [_values(rank, number, 50 * 3, dtype).view(50, 3) for rank in group.global_ranks]
        columns = [3] * group.size
        found = group.start_all_to_all(whole[own], 0, rows, 1, columns).wait()
        expected = torch.cat([one.split(rows)[own] for one in whole], 1)
    elif kind == "broadcast":
        found, expected = group.broadcast(mine, source), parts[source]
    elif kind == "gather":
        shapes = [[size] for size in sizes]
        gathered = group.gather(mine[: sizes[own]], shapes)
        found = torch.cat(gathered) if gathered else mine
        expected = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        expected = expected if own == 0 else mine
    else:
        found, expected = mine.clone(), sum(parts[1:], parts[0])
        dist.all_reduce(found, group=group.group)
    assert torch.equal(found, expected), f"number {number}, {kind} of {count} {dtype} in {group} is wrong"


def _storm(seed: int, operations: int, victim: int | None) -> list[Any]:
    """Random collectives; a victim ends itself somewhere among them. What the last failure said, and when."""
    size = int(os.environ["WORLD_SIZE"])
    everybody = communicator(colrow.init_mesh(tp=size, timeout=30))
    common, own = random.Random(seed), random.Random(f"{seed} {dist.get_rank()}")
    members: Sequence[tuple[int, ...]] = [
        chosen for number in range(2, size + 1) for chosen in itertools.combinations(range(size), number)
    ]
    made = {chosen: dist.new_group(chosen) for chosen in members}
    groups = {chosen: communicator(group) for chosen, group in made.items() if dist.get_rank() in chosen}
    fatal = common.randrange(operations)
    begin = time.monotonic()
    try:
        for number in range(operations):
            chosen = common.choice(members)
            kind = common.choice(KINDS)
            draw = random.Random(common.random())
            if dist.get_rank() == victim and number >= fatal:
                time.sleep(own.random() * 0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            if dist.get_rank() in chosen:
                delay = own.random() * 0.02 if own.random() < 0.1 else 0.0
                begin = time.monotonic()
                _one(kind, groups[chosen], number, draw, delay)
        begin = time.monotonic()
        everybody.barrier()
    except colrow.RankFailure as failure:
        return [list(failure.ranks), time.monotonic() - begin, str(failure)]
    return []


def _check(size: int, seed: int, operations: int, victim: int | None) -> None:
    ends = crew.run(_storm, seed, operations, victim, size=size, limit=120)
    for rank, end in enumerate(ends):
        if rank == victim:
            assert end.code == -signal.SIGKILL
        elif victim is None:
            assert (end.code, end.result) == (0, []), f"rank {rank}, seed {seed}: {end}"
        else:
            assert end.code == 0, f"rank {rank}, seed {seed}: {end}"
            assert end.result[0] == [victim], f"rank {rank}, seed {seed}: {end}"
            assert end.result[1] < 10.0


def test_storm() -> None:
    _check(4, 1, 120, None)


def test_storm_with_a_kill() -> None:
    for seed in (1, 2):
        _check(4, seed, 60, seed % 4)


@pytest.mark.slow
def test_long_storms() -> None:
    for seed in range(100, 120):
        _check(2 + seed % 4, seed, 800, None)


@pytest.mark.slow
def test_many_kills() -> None:
    for seed in range(200, 240):
        size = 2 + seed % 4
        _check(size, seed, 100, seed % size)
