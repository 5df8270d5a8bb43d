"""The ranks of a group decide together whether they share memory, and attach to it.

Everything here is decided from what all ranks have said, so that all come to the same result: either all use
shared memory or none does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from colrow.transport.arena import CREATORS, SLOTS, Arena, hold
from colrow.transport.processors import Waiting, choose_waiting, own_processors, processor_quota

VARIABLE = "COLROW_TRANSPORT"
WISHES = ("auto", "shm", "gloo")
MAX_RANKS = 64
NATIVE_VERSION = 1
"""Of the C extension's interface: to be raised there and here when that changes."""

Exchange = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""Gives all ranks' records, in rank order, to each of them."""


@dataclass(frozen=True)
class Member:
    """What a rank says about itself.

    Attributes:
        boot: tells the running kernel from all others.
        lacks: why this rank cannot share memory; empty if it can.
        wish: ``auto``, ``shm`` or ``gloo``.
        processors: that it may use, as a set of bits in hexadecimal.
        threads: that it computes with.
        neighbours: ranks of the job on its host, as far as it knows.
        quota: number of processors of whose time its control group gets no more; 0 if there is no limit.
    """

    boot: str
    lacks: str
    wish: str
    processors: str
    threads: int
    neighbours: int
    quota: float


def wish() -> str:
    """What the environment asks for.

    Raises:
        ValueError: if it is none of the possibilities.
    """
    value = os.environ.get(VARIABLE, "") or "auto"
    if value not in WISHES:
        raise ValueError(
            f"the environment variable {VARIABLE} must be one of {', '.join(WISHES)}, not {value!r}"
        )
    return value


def what_is_lacking() -> str:
    """Why this process cannot share memory with others; empty if it can."""
    try:
        from colrow.transport import _native
    except ImportError as error:
        return f"colrow was installed without its C extension ({error})"
    if _native.VERSION != NATIVE_VERSION:
        return "colrow's C extension was built for another version of colrow: install colrow again"
    return ""


def introduce() -> Member:
    """What this process tells the others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    quota = processor_quota()
    return Member(
        boot=boot,
        lacks=what_is_lacking(),
        wish=wish(),
        processors=f"{own_processors():x}",
        threads=torch.get_num_threads(),
        neighbours=int(os.environ.get("LOCAL_WORLD_SIZE") or 1),
        quota=0 if quota == float("inf") else quota,
    )


@dataclass(frozen=True)
class Agreement:
    """What the ranks of a group have decided.

    Attributes:
        arena: open on this rank; ``None`` if the group does not share memory.
        waiting: how its ranks wait.
        reason: why, in words.
    """

    arena: Arena | None
    waiting: Waiting
    reason: str


def agree(exchange: Exchange, rank: int, ranks: int, global_ranks: Sequence[int]) -> Agreement:
    """Decide whether the ranks of a group share memory; if so, this rank has it open afterwards.

    Args:
        exchange: collective among the ranks.
        rank: this process's rank in the group.
        ranks: size of the group.
        global_ranks: the members' job-wide ranks, for messages.

    Raises:
        ValueError: if shared memory was asked for and is impossible, or the ranks were asked for different
            things; on all ranks.
        RuntimeError: whatever ``exchange`` raises.
    """
    members = [Member(**record) for record in exchange(asdict(introduce()))]
    reason = _obstacle(members, global_ranks)
    waiting = _waiting(members)
    if reason:
        return Agreement(None, waiting, reason)
    problems = []
    for create in CREATORS:
        arena, problem = _try(create, exchange, rank, ranks)
        if arena is not None:
            return Agreement(arena, waiting, "")
        problems.append(problem)
    reason = f"memory cannot be shared: {'; '.join(problems)}"
    if members[0].wish == "shm":
        raise ValueError(f"{VARIABLE}=shm, but {reason}")
    return Agreement(None, waiting, reason)


def _obstacle(members: Sequence[Member], global_ranks: Sequence[int]) -> str:
    """Why the group cannot or should not share memory, as far as is known without trying."""
    wishes = {member.wish for member in members}
    if len(wishes) > 1:
        told = ", ".join(f"{global_ranks[rank]}: {member.wish}" for rank, member in enumerate(members))
        raise ValueError(f"{VARIABLE} is not the same on all ranks ({told})")
    if wishes == {"gloo"}:
        return f"{VARIABLE}=gloo"
    if len({member.boot for member in members}) > 1:
        return (
            "its ranks are on several hosts"  # also where shared memory was asked for: it serves the others
        )
    obstacle = ""
    lacking = [(rank, member.lacks) for rank, member in enumerate(members) if member.lacks]
    if lacking:
        rank, lacks = lacking[0]
        obstacle = lacks if len(lacking) == len(members) else f"on rank {global_ranks[rank]} {lacks}"
    elif len(members) > MAX_RANKS:
        obstacle = f"it serves at most {MAX_RANKS} ranks of one host, not {len(members)}"
    elif not members[0].boot:
        obstacle = "it cannot be told whether the ranks are on one host"
    if obstacle and wishes == {"shm"}:
        raise ValueError(f"{VARIABLE}=shm, but {obstacle}")
    return obstacle


def _waiting(members: Sequence[Member]) -> Waiting:
    return choose_waiting(
        [int(member.processors, 16) for member in members],
        [member.threads for member in members],
        max(member.neighbours for member in members),
        min((member.quota for member in members if member.quota), default=float("inf")),
    )


def _try(
    create: Callable[[int], Arena], exchange: Exchange, rank: int, ranks: int
) -> tuple[Arena | None, str]:
    """One way to share memory: the first rank creates it, the others open it; all or none succeed."""
    arena, problem = None, ""
    if rank == 0:
        try:
            arena = create(ranks)
        except OSError as error:
            problem = str(error)
    offer = exchange({"path": arena.path if arena else "", "chunk": arena.chunk if arena else 0})[0]
    if rank > 0 and offer["path"]:
        try:
            arena = open_arena(offer["path"], offer["chunk"], rank, ranks)
        except OSError as error:
            problem = str(error)
    problems = [answer["problem"] for answer in exchange({"problem": problem[:200]})]
    if arena is not None and arena.has_name and rank == 0:
        os.unlink(arena.path)
    failed = next((one for one in problems if one), "")
    if failed and arena is not None:
        os.close(arena.file)
        arena = None
    return arena, failed


def open_arena(path: str, chunk: int, rank: int, ranks: int) -> Arena:
    """Open memory that the first rank has made, and hold this rank's lock on it.

    Raises:
        OSError: if it cannot be seen from here, or is not what it was said to be.
    """
    from colrow.transport import _native

    size = _native.arena_bytes(ranks, chunk, SLOTS)
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if os.fstat(file).st_size < size:
        os.close(file)
        raise OSError(f"{path} is not the memory that the first rank has made")
    hold(file, rank)
    return Arena(file, path, chunk, SLOTS, size)
