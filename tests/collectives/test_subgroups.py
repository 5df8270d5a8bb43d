"""Making groups: ranks that have made others, or disagree on what to make, in fresh processes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import colrow
from colrow.collectives import communicator
from tests.collectives import crew
from tests.pool import Pool

TIMEOUT = 2.0


@pytest.fixture(autouse=True)
def _server(ranks: Callable[[int], Pool]) -> None:
    """The pools' fork server runs."""
    ranks(1)


def _after_other_groups() -> list[float]:
    """Ranks that have made 0, 1 and 2 groups of their own make one together, in an order of their own."""
    world = communicator(colrow.init_mesh(tp=3, timeout=20))
    for _ in range(world.rank):
        dist.new_group([world.rank], use_local_synchronization=True)
    first = world.subgroup([2, 0]) if world.rank != 1 else world.subgroup([1])
    second = world.subgroup([1, 2, 0])
    assert second.global_ranks == (1, 2, 0)
    assert first is world.subgroup(first.global_ranks)
    own = torch.tensor([float(world.rank)])
    dist.barrier(second.group)
    return [*first.all_gather(own, 0).tolist(), *second.all_gather(own, 0).tolist()]


def test_ranks_that_have_made_different_numbers_of_groups() -> None:
    """They meet all the same. By torch's names they would wait until the timeout."""
    ends = crew.run(_after_other_groups, size=3)
    assert [end.result for end in ends] == [[2, 0, 1, 2, 0], [1, 1, 2, 0], [2, 0, 1, 2, 0]]


def _in_contradicting_orders() -> None:
    world = communicator(colrow.init_mesh(tp=3, timeout=20))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT), world.group)
    first = ([0, 1], [1, 2], [2, 0])[world.rank]
    with crew.timed():
        world.subgroup(first)


def test_a_circle_of_groups() -> None:
    """Each rank makes a group with the next one first: every rank's error lists what all wait for."""
    ends = crew.run(_in_contradicting_orders, size=3)
    for end in ends:
        for rank, members in enumerate(("0, 1", "1, 2", "2, 0")):
            assert f"rank {rank} in new_group 'ranks {members}'" in end.message, end
        assert "the ranks are in different collectives" in end.message
        assert end.seconds > TIMEOUT - 0.5


def _without_one() -> None:
    world = communicator(colrow.init_mesh(tp=3, timeout=20))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT), world.group)
    if world.rank == 2:
        time.sleep(60)
    with crew.timed():
        world.subgroup([0, 1, 2][::-1])


def test_a_member_that_does_not_come() -> None:
    ends = crew.run(_without_one, size=3, stuck=(2,))
    for end in ends[:2]:
        assert end.ranks == (2,), end
        assert "new_group 'ranks 2, 1, 0' did not complete on rank" in end.message
        assert "rank 2 did not reach it in time: it is at" in end.message


def _different_meshes(case: str) -> str:
    colrow.init_mesh(tp=4, timeout=20)
    sizes = {"tp": 4}
    if case == "tp" and dist.get_rank() in (1, 2):
        sizes = {"tp": 2, "dp": 2}
    if case == "groups" and dist.get_rank() == 3:
        dist.new_group([3])
    begin = time.monotonic()
    try:
        colrow.init_mesh(**sizes)  # type: ignore[arg-type]
    except ValueError as error:
        assert time.monotonic() - begin < 10
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("tp", r"the ranks do not agree on dp \(1 on ranks 0, 3; 2 on ranks 1, 2\)\. Call it with the same"),
        (
            "groups",
            r"process groups made before \((\d) on ranks 0, 1, 2; (\d) on rank 3\)\. torch finds a group by",
        ),
    ],
)
def test_meshes_that_differ_between_ranks_are_refused_on_all(case: str, message: str) -> None:
    for end in crew.run(_different_meshes, case, size=4):
        assert end.result is not None
        assert re.search(message, end.result), end
