"""How the ranks of a group decide: from what all have said, so that all decide alike."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from colrow.transport import agreement
from colrow.transport.agreement import Member, agree, introduce, wish
from colrow.transport.arena import LARGEST_CHUNK, SMALLEST_CHUNK, chunk_for
from colrow.transport.processors import (
    SHORT_SPIN_SECONDS,
    SPIN_SECONDS,
    YIELD_SECONDS,
    Waiting,
    choose_waiting,
)
from tests.transport.available import needs_extension

MEMBER = Member(boot="a", lacks="", wish="auto", processors="f", threads=1, neighbours=2, quota=0)


def _agree(monkeypatch: pytest.MonkeyPatch, *members: Member) -> str:
    """The reason that a group of these would use gloo; nobody may try to share memory."""

    def exchange(record: dict[str, Any]) -> list[dict[str, Any]]:
        return [asdict(member) for member in members]

    monkeypatch.setattr(agreement, "CREATORS", ())
    result = agree(exchange, 0, range(4, 4 + len(members)))
    assert result.arena is None
    return result.reason


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (replace(MEMBER, lacks="no extension"), "on rank 5 no extension"),
        (replace(MEMBER, boot="b"), "its 2 ranks are on 2 hosts, where it is not faster"),
        (MEMBER, "memory cannot be shared: "),
    ],
)
def test_one_rank_that_cannot_is_enough(monkeypatch: pytest.MonkeyPatch, second: Member, reason: str) -> None:
    assert _agree(monkeypatch, MEMBER, second) == reason


def test_reasons_that_all_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = replace(MEMBER, lacks="no extension")
    assert _agree(monkeypatch, lacks, lacks) == "no extension"
    assert _agree(monkeypatch, *[MEMBER] * 65) == "it serves at most 64 ranks of one host, not 65"
    unknown = replace(MEMBER, boot="")
    assert "cannot be told whether" in _agree(monkeypatch, unknown, unknown)
    gloo = replace(MEMBER, wish="gloo")
    assert _agree(monkeypatch, gloo, gloo) == "COLROW_TRANSPORT=gloo"


def test_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory that was asked for and cannot be had is an error; between hosts it serves others."""
    asked = replace(MEMBER, wish="shm")
    with pytest.raises(ValueError, match="COLROW_TRANSPORT=shm, but on rank 5 no extension"):
        _agree(monkeypatch, asked, replace(asked, lacks="no extension"))
    with pytest.raises(ValueError, match="COLROW_TRANSPORT=shm, but memory cannot be shared"):
        _agree(monkeypatch, asked, asked)
    assert "are on 2 hosts" in _agree(monkeypatch, asked, replace(asked, boot="b"))
    with pytest.raises(ValueError, match=r"not the same on all ranks \(4: shm, 5: auto\)"):
        _agree(monkeypatch, asked, MEMBER)
    for value, expected in (("", "auto"), ("gloo", "gloo"), ("shm", "shm")):
        monkeypatch.setenv("COLROW_TRANSPORT", value)
        assert wish() == expected
    monkeypatch.setenv("COLROW_TRANSPORT", "rdma")
    with pytest.raises(ValueError, match="must be one of auto, shm, gloo, not 'rdma'"):
        wish()


def test_what_a_rank_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLROW_TRANSPORT", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    own = introduce()
    assert int(own.processors, 16).bit_count() == len(os.sched_getaffinity(0))
    assert own.neighbours == 3
    assert own.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_without_the_extension() -> None:
    """Importing works, and the reason is told."""
    program = (
        "import sys; sys.modules['colrow.transport._native'] = None\n"
        "import colrow; from colrow.transport.agreement import what_is_lacking; print(what_is_lacking())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("colrow was installed without its C extension (")


SPINS, YIELDS = Waiting(SPIN_SECONDS, 0.0), Waiting(SHORT_SPIN_SECONDS, YIELD_SECONDS)


@pytest.mark.parametrize(
    ("processors", "threads", "neighbours", "quota", "expected"),
    [
        ([0b11, 0b11], [1, 1], 2, math.inf, SPINS),
        ([0b1, 0b10], [1, 1], 2, math.inf, SPINS),  # each pinned to its own
        ([0b1, 0b1], [1, 1], 2, math.inf, YIELDS),  # both pinned to the same
        ([0b11, 0b11], [2, 2], 2, math.inf, YIELDS),  # more threads than processors
        ([0b1111, 0b1111], [1, 1], 8, math.inf, YIELDS),  # other ranks of the job are here, too
        ([0b1111, 0b1111], [1, 1], 2, 1.5, YIELDS),  # a container with less than it sees
        ([0b1111, 0b1111], [1, 3], 1, 4.0, SPINS),
    ],
)
def test_waiting(
    processors: list[int], threads: list[int], neighbours: int, quota: float, expected: Waiting
) -> None:
    assert choose_waiting(processors, threads, neighbours, quota) == expected


@needs_extension
def test_memory_of_large_groups() -> None:
    from colrow.transport import _native
    from colrow.transport.arena import SLOTS

    assert chunk_for(2) == LARGEST_CHUNK
    for ranks in range(1, 65):
        size = _native.arena_bytes(ranks, chunk_for(ranks), SLOTS)
        assert size < (24 << 20), f"{ranks} ranks share {size} bytes"
        assert _native.arena_bytes(ranks, SMALLEST_CHUNK, SLOTS) < size or chunk_for(ranks) == SMALLEST_CHUNK
    for ranks, chunk, slots in ((0, 65536, 4), (65, 65536, 4), (2, 4096, 4), (2, 65536, 3), (2, 65536, 16)):
        with pytest.raises(ValueError, match="no arena of"):
            _native.arena_bytes(ranks, chunk, slots)
