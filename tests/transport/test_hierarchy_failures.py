"""Ranks on several hosts, of which one dies, hangs or strays: all ranks fail in time, and name it."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import colrow
from colrow.collectives import Communicator, communicator, process
from colrow.transport import HierarchicalGroup, share_memory
from tests.collectives import crew
from tests.pool import Pool
from tests.transport.available import needs_shared_memory
from tests.transport.hosts import on_hosts

pytestmark = needs_shared_memory

HOSTS = (0, 0, 1, 1, 1)
TIMEOUT = 2.0
BUSY = 3.0
"""Seconds that a busy machine may add."""
LARGE, SMALL = 400_000, 100


@pytest.fixture(autouse=True)
def _server(ranks: Callable[[int], Pool]) -> None:
    """The pools' fork server runs."""
    ranks(1)


def _ready(timeout: float = TIMEOUT) -> Communicator:
    """A group of all ranks; processes of another host cannot be seen from here."""
    size = int(os.environ["WORLD_SIZE"])
    real = process._kernel
    process._kernel = lambda: f"{real()} host {HOSTS[int(os.environ['RANK'])]}"
    with on_hosts(HOSTS):
        ranks = communicator(colrow.init_mesh(tp=size, timeout=30))
        ranks.all_reduce(torch.ones(LARGE), label="first")
    assert isinstance(share_memory(ranks.group), HierarchicalGroup)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), ranks.group)
    ranks.barrier()
    return ranks


def _happens(event: str, guilty: int, count: int) -> None:
    ranks = _ready()
    with crew.timed():
        for step in range(4):
            if ranks.rank == guilty and step == 2:
                if event == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if event == "raises":
                    raise TypeError("boom")
                time.sleep(60)
            ranks.all_reduce(torch.ones(count), label=f"step {step}")
    time.sleep(TIMEOUT)  # who fails is not seen to end its process


@pytest.mark.parametrize(
    ("event", "guilty", "count", "fault", "longest"),
    [
        ("dies", 4, LARGE, "rank 4 died", 1.0),  # works for nobody on another host
        ("dies", 2, SMALL, "rank 2 died", 1.0),  # carries for its host
        ("dies", 0, LARGE, "rank 0 died", 1.0),
        ("raises", 3, SMALL, "rank 3 raised TypeError: boom", 1.0),
        ("hangs", 4, LARGE, "rank 4 did not reach it in time: it is at", TIMEOUT + 1.0),
        ("hangs", 0, SMALL, "rank 0 did not reach it in time: it is at", TIMEOUT + 1.0),
    ],
)
def test_all_hosts_learn_who_is_at_fault(
    event: str, guilty: int, count: int, fault: str, longest: float
) -> None:
    ends = crew.run(_happens, event, guilty, count, size=len(HOSTS), stuck=(guilty,))
    for rank, end in enumerate(ends):
        if rank != guilty:
            assert end.ranks == (guilty,), end
            assert fault in end.message, end
            assert end.label == "step 2", end
            assert end.seconds < longest + BUSY, end


STRAYS: dict[str, tuple[Callable[[Communicator], Tensor], Callable[[Communicator], Tensor], str]] = {
    "size": (
        lambda ranks: ranks.all_reduce(torch.ones(SMALL)),
        lambda ranks: ranks.all_reduce(torch.ones(LARGE)),
        r"rank \d is in all_reduce \(sum\) of \d+ float32, rank \d on another host in all_reduce \(sum\) of",
    ),
    "operation": (
        lambda ranks: ranks.all_reduce(torch.ones(LARGE)),
        lambda ranks: ranks.all_gather(torch.ones(LARGE), 0),
        "in all_gather of 8000000 bytes of float32",
    ),
    "broadcast": (  # whose source waits for nobody
        lambda ranks: ranks.all_reduce(torch.ones(SMALL)),
        lambda ranks: ranks.broadcast(torch.ones(SMALL), 3),
        "the ranks are in different collectives",
    ),
    "broadcasts": (
        lambda ranks: ranks.broadcast(torch.ones(SMALL), 0),
        lambda ranks: ranks.broadcast(torch.ones(LARGE), 0),
        r"in all_gather of \d+ bytes of float32, rank \d on another host in all_gather of",
    ),
    "dtype": (
        lambda ranks: ranks.broadcast(torch.ones(SMALL), 0),
        lambda ranks: ranks.broadcast(torch.ones(SMALL).int(), 0),
        r"in all_gather of \d+ bytes of (float|int)32, rank \d on another host in all_gather of",
    ),
    "parts": (
        lambda ranks: ranks.start_exchange(torch.ones(5), [1] * 5, [2] * 5).wait(),
        lambda ranks: ranks.start_exchange(torch.ones(5), [1] * 5, [1] * 5).wait(),
        r"all_to_all: rank 0 gives rank 0 4 bytes, which takes 8",
    ),
    "dtype of parts": (
        lambda ranks: ranks.start_exchange(torch.ones(5), [1] * 5, [1] * 5).wait(),
        lambda ranks: ranks.start_exchange(torch.ones(5).int(), [1] * 5, [1] * 5).wait(),
        r"rank 0 is in all_to_all of (float|int)32, rank \d in all_to_all of (float|int)32",
    ),
    "cut": (
        lambda ranks: ranks.reduce_scatter(torch.ones(20_000), 0, [20_000, 0, 0, 0, 0]),
        lambda ranks: ranks.reduce_scatter(torch.ones(20_000), 0, [0, 20_000, 0, 0, 0]),
        "divided differently over the ranks",
    ),
}


def _strays(kind: str) -> None:
    ranks = _ready(30.0 if kind != "broadcast" else TIMEOUT)
    with crew.timed():
        STRAYS[kind][HOSTS[ranks.rank]](ranks)  # type: ignore[operator]
        ranks.barrier()  # a rank that nothing is sent to, and so was not concerned


@pytest.mark.parametrize("kind", STRAYS)
def test_hosts_in_different_calls_fail_at_once(kind: str) -> None:
    """gloo alone would end a process, or take a shorter message without a word."""
    ends = crew.run(_strays, kind, size=len(HOSTS))
    for end in ends:
        assert end.code == 0, end
        assert end.ranks == (), end
        assert end.seconds < 5.0 + BUSY, end
    assert any(re.search(STRAYS[kind][2], end.message) for end in ends), ends


def _after_a_failure() -> list[str]:
    """Every further call fails at once, on all ranks."""
    ranks = _ready(30.0)
    memory = share_memory(ranks.group)
    assert memory is not None
    if ranks.rank == 3:
        memory.close()
    errors = []
    begin = time.monotonic()
    for _ in range(2):
        try:
            memory.all_reduce(torch.ones(SMALL), torch.ones(SMALL))
        except RuntimeError as error:
            errors.append(f"{type(error).__name__}: {error}")
    assert time.monotonic() - begin < BUSY
    return errors


def test_a_group_that_has_failed() -> None:
    ends = crew.run(_after_a_failure, size=len(HOSTS))
    for rank, end in enumerate(ends):
        assert len(end.result) == 2, end
        assert all(text.startswith("TransportError: ") for text in end.result), end
        if rank == 3:
            assert end.result == ["TransportError: this rank has left the group"] * 2
        else:
            assert "a collective has failed before" in end.result[1]
    assert "rank 3 has left the group" in ends[2].result[0]


def _interrupted() -> list[Any]:
    """Ctrl-C on one host, which waits for the other."""
    ranks = _ready(30.0)
    if HOSTS[ranks.rank] == 1:
        time.sleep(60)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    try:
        ranks.all_reduce(torch.ones(SMALL))
    except BaseException as error:
        dist.destroy_process_group = lambda: None  # which waits for gloo
        return [time.monotonic() - begin, type(error).__name__]
    return []


def test_control_c_while_waiting_for_another_host() -> None:
    ends = crew.run(_interrupted, size=len(HOSTS), stuck=(2, 3, 4))
    assert ends[0].result[1] == "KeyboardInterrupt", ends[0]
    for end in ends[:2]:  # the second may see that the first has left
        assert end.result[0] < 0.3 + 0.3 + BUSY
