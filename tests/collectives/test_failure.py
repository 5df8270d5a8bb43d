"""A rank dies, raises, hangs or strays: every other rank ends in time and names it and the collective."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import colrow
from colrow import collectives
from colrow.collectives import Communicator, communicator
from colrow.collectives.failure import GRACE_SECONDS, find_fault, report_exception
from colrow.collectives.notices import Evidence, Verdict
from colrow.collectives.position import Position
from tests.collectives import crew
from tests.pool import Pool
from tests.transport.available import SHARED

TIMEOUT = 2.0
BUSY = 2.0
"""Seconds that a busy machine may add."""


@pytest.fixture(autouse=True)
def _server(ranks: Callable[[int], Pool]) -> None:
    """The pools' fork server runs with its modules loaded, whichever test comes first."""
    ranks(1)


def _groups(tp: int, dp: int) -> tuple[Communicator, Communicator]:
    """tp and dp group; joined without haste, then with a short timeout, all ranks at the same point."""
    colrow.init_mesh(tp=tp, dp=dp, timeout=30)
    mesh = colrow.init_mesh(tp=tp, dp=dp, timeout=TIMEOUT)
    communicator(mesh["tp"]).barrier()
    communicator(mesh["dp"]).barrier()
    return communicator(mesh["tp"]), communicator(mesh["dp"])


def _train(event: str, guilty: int, tp: int, dp: int) -> None:
    """Steps of training in which something happens to one rank."""
    tp_group, dp_group = _groups(tp, dp)
    x = torch.ones(100, requires_grad=True)
    with crew.timed():
        for step in range(6):
            if dist.get_rank() == guilty and step == 3:
                _happen(event, tp_group)
            entered = collectives.enter(x, tp_group, label=f"enter step {step}")
            y = collectives.all_reduce(entered * 2, tp_group, label=f"exit step {step}")
            y.sum().backward()
            dp_group.all_reduce(y.detach(), label=f"gradients step {step}")


def _happen(event: str, tp_group: Communicator) -> None:
    if event == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif event == "raise":
        raise TypeError("boom")
    elif event == "hang":
        time.sleep(60)
    elif event == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif event == "leave":
        dist.destroy_process_group()
        time.sleep(60)
    elif event == "stray":
        tp_group.all_gather(torch.ones(3), 0, label="elsewhere")


def _check_all(ends: list[crew.End], guilty: int, fault: str, *, shortest: float, longest: float) -> None:
    for rank, end in enumerate(ends):
        if rank != guilty:
            assert end.ranks == (guilty,), end
            assert re.search(fault, end.message), end
            assert re.search(r"(exit|gradients) step 3", end.label), end
            assert f"{end.label!r} did not complete on rank {rank}" in end.message
            assert shortest < end.seconds < longest + BUSY, end


AT_ONCE: dict[str, float] = {"shortest": 0.0, "longest": 1.0}
"""A closed connection is noticed without waiting for a timeout."""
IN_TIME: dict[str, float] = {"shortest": TIMEOUT - 0.5, "longest": TIMEOUT + 1.0}
"""The timeout, then the others answer at once; a rank that started to wait earlier fails earlier."""
WITHOUT_ANSWER: dict[str, float] = {"shortest": TIMEOUT, "longest": TIMEOUT + GRACE_SECONDS}


@pytest.mark.parametrize("hosts", [False, True])
@pytest.mark.parametrize(
    ("event", "fault"), [("kill", r"rank 3 died \(process \d+"), ("raise", "rank 3 raised TypeError: boom")]
)
def test_a_dead_rank_is_named_in_all_groups(event: str, fault: str, hosts: bool) -> None:
    """Rank 0 shares no group with rank 3: it sees rank 1 or 2 leave, and must not blame them."""
    ends = crew.run(_train, event, 3, 2, 2, size=4, first_rank_hosts=hosts)
    assert ends[3].code == (-signal.SIGKILL if event == "kill" else 1)
    _check_all(ends, 3, fault, **AT_ONCE)
    # the label is that of the rank's own collective: rank 2 shares the tp group with rank 3
    assert "exit" in ends[2].label
    assert "gradients" in ends[0].label


def test_a_dead_rank_of_three() -> None:
    """Two ranks fail because of the third; whichever leaves first must not be blamed by the other."""
    ends = crew.run(_train, "kill", 1, 3, 1, size=3)
    _check_all(ends, 1, "rank 1 died", **AT_ONCE)


def test_a_hanging_rank_is_named_with_its_line() -> None:
    ends = crew.run(_train, "hang", 1, 2, 2, size=4, stuck=(1,))
    _check_all(ends, 1, r"rank 1 did not reach .* it is at .*test_failure.py:\d+ in _happen", **IN_TIME)


def test_a_stopped_rank_is_named_without_its_answer() -> None:
    ends = crew.run(_train, "stop", 1, 2, 1, size=2, stuck=(1,))
    _check_all(ends, 1, "rank 1 did not reach it in time and does not answer", **WITHOUT_ANSWER)


def test_a_rank_that_leaves_the_process_group() -> None:
    ends = crew.run(_train, "leave", 1, 2, 1, size=2, stuck=(1,))
    _check_all(ends, 1, r"rank 1 did not reach it in time: it is at .* in _happen", **AT_ONCE)


def test_ranks_in_different_collectives() -> None:
    """Only those that contradict each other are listed, by all; nobody is blamed."""
    ends = crew.run(_train, "stray", 3, 2, 2, size=4)
    for end in ends:
        assert end.ranks == ()
        at_odds = "rank 2 in all_reduce 'exit step 3'; rank 3 in all_gather 'elsewhere'"
        assert f"the ranks are in different collectives: {at_odds} (" in end.message, end
        expected = AT_ONCE if SHARED else IN_TIME  # gloo waits for the rank that it thinks is late
        assert expected["shortest"] < end.seconds < expected["longest"] + BUSY


def test_the_stores_host_dies() -> None:
    """Under a plain launcher the key-value store dies with rank 0, and with it what others could read."""
    ends = crew.run(_train, "kill", 0, 2, 1, size=2, first_rank_hosts=True)
    _check_all(ends, 0, "key-value store is gone .*: rank 0, which hosts it", **AT_ONCE)


def test_the_stores_host_raises() -> None:
    """It stays long enough for the others to read what it raised."""
    ends = crew.run(_train, "raise", 0, 2, 1, size=2, first_rank_hosts=True)
    _check_all(ends, 0, "rank 0 raised TypeError: boom", **AT_ONCE)


def _only_two(guilty: int) -> list[float]:
    """Two tp groups that do not depend on each other: one of them loses a rank."""
    tp_group, _ = _groups(tp=2, dp=2)
    for step in range(4):
        if dist.get_rank() == guilty and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        result = tp_group.all_reduce(torch.ones(2), label=f"alone {step}")
    return result.tolist()


def test_another_group_goes_on() -> None:
    ends = crew.run(_only_two, 2, size=4)
    assert [end.result for end in ends[:2]] == [[2.0, 2.0]] * 2
    assert ends[3].ranks == (2,)
    assert ends[3].label == "alone 2"


def _late() -> None:
    tp_group, _ = _groups(tp=2, dp=1)
    if dist.get_rank() == 1:
        time.sleep(TIMEOUT + 1.2)
    tp_group.all_reduce(torch.ones(2), label="late")


def test_a_late_rank() -> None:
    ends = crew.run(_late, size=2)
    assert ends[0].ranks == (1,), ends
    assert re.search("rank 1 (did not reach it in time|came .* after the first)", ends[0].message)


def _handle_and_raise() -> None:
    """The user's own handler raises another exception when a collective fails."""
    tp_group, dp_group = _groups(tp=2, dp=2)
    if dist.get_rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        tp_group.all_reduce(torch.ones(2), label="exit")
    except colrow.RankFailure as failure:
        raise KeyError("the user's own") from failure
    dp_group.all_reduce(torch.ones(2), label="gradients")


def test_a_users_handler_is_not_to_blame() -> None:
    ends = crew.run(_handle_and_raise, size=4)
    assert ends[2].code == 1
    for end in ends[:2]:
        assert end.ranks == (3,), end
        assert "rank 3 died" in end.message


def _barrier_of_torch() -> str:
    """A collective that is not colrow's: an exception that says only that a connection closed."""
    _groups(tp=2, dp=1)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError as error:
        return str(report_exception(error))
    return ""


def test_collectives_of_torchs_own() -> None:
    ends = crew.run(_barrier_of_torch, size=2)
    assert re.match(
        r"torch\.distributed\.barrier, called at .*test_failure.py:\d+ in _barrier_of_torch did not complete "
        r"on rank 0: rank 1 died",
        ends[0].result,
    )


def _join(timeout: float) -> None:
    colrow.init_mesh(tp=int(os.environ["WORLD_SIZE"]), timeout=timeout)


@pytest.mark.parametrize("hosts", [False, True])
def test_a_rank_that_never_joins(hosts: bool) -> None:
    ends = crew.run(_join, 3.0, size=3, absent=(1,), first_rank_hosts=hosts)
    for end in ends:
        assert end.ranks == (1,), end
        assert end.label == "init_mesh"
        assert "never joined: rank 1" in end.message


# The reasoning alone, on positions that real processes reach only now and then.

HERE = Position("all_reduce 'a'", (0, 1, 2), since=100.0)


def _fault(mine: Position = HERE, **others: Evidence) -> Verdict:
    return find_fault(0, mine, {int(name[4:]): (mine, evidence) for name, evidence in others.items()})


def _at(position: Position, **more: Any) -> Evidence:
    return Evidence(position=position, process="process 7 on host", **more)


def test_an_exception_beats_a_death_beats_silence() -> None:
    raised, died = Evidence(raised="TypeError: boom"), Evidence(died=True, process="process 7 on host")
    assert _fault(rank1=died, rank2=raised) == Verdict((2,), "rank 2 raised TypeError: boom")
    assert _fault(rank1=died, rank2=Evidence()) == Verdict((1,), "rank 1 died (process 7 on host)")
    both = _fault(rank1=died, rank2=died)
    assert both.ranks == (1, 2)
    assert both.fault.count("died") == 2


def test_who_failed_because_of_another_is_not_blamed_when_gone() -> None:
    gone_since = _at(HERE, left=True)
    late = _at(Position(place="train.py:5 in step"))
    assert _fault(rank1=gone_since, rank2=late).ranks == (2,)


def test_all_there_but_too_late() -> None:
    late = Position(HERE.collective, HERE.group, since=107.5)
    verdict = _fault(rank1=_at(HERE), rank2=_at(late))
    assert verdict == Verdict((2,), "rank 2 came 7.5 s after the first")


def test_all_there_in_time() -> None:
    verdict = _fault(rank1=_at(HERE), rank2=_at(HERE))
    assert verdict.ranks == ()
    assert "differ in size" in verdict.fault


def test_a_circle_of_waiting() -> None:
    """Each waits in a group of its own for the next: nobody contradicts, so all are listed."""
    mine = Position("a", (0, 1))
    others = {1: (mine, _at(Position("b", (1, 2)))), 2: (mine, _at(Position("c", (2, 0))))}
    verdict = find_fault(0, mine, others)
    assert verdict == Verdict(
        (), "the ranks are in different collectives: rank 0 in a; rank 1 in b; rank 2 in c"
    )
