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
LEAST_RANKS_PER_HOST = 2
"""On average: with fewer, gloo among all is as fast as in steps within and between hosts."""
NATIVE_VERSION = 2
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


def own_host() -> str:
    """What tells the running kernel from all others; empty if it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def introduce() -> Member:
    """What this process tells the others."""
    quota = processor_quota()
    return Member(
        boot=own_host(),
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
        arena: open on this rank; ``None`` if it is alone on its host, or the group does not share memory.
        waiting: how the ranks of this host wait.
        reason: why the group does not share memory, in words; empty if it does.
        hosts: ranks of the group on each host, in the order of their first ones.
    """

    arena: Arena | None
    waiting: Waiting
    reason: str
    hosts: tuple[tuple[int, ...], ...]


def agree(exchange: Exchange, rank: int, global_ranks: Sequence[int]) -> Agreement:
    """Decide whether the ranks of a group share memory, on each host that it is on those of the host.

    Args:
        exchange: collective among the ranks.
        rank: this process's rank in the group.
        global_ranks: the members' job-wide ranks, for messages.

    Raises:
        ValueError: if shared memory was asked for and is impossible, or the ranks were asked for different
            things; on all ranks.
        RuntimeError: whatever ``exchange`` raises.
    """
    members = [Member(**record) for record in exchange(asdict(introduce()))]
    hosts = _hosts(members)
    own = next(host for host in hosts if rank in host)
    waiting = _waiting([members[one] for one in own])
    reason = _obstacle(members, hosts, global_ranks)
    if reason:
        return Agreement(None, waiting, reason, hosts)
    is_alone = len(own) == 1 and len(hosts) > 1
    problems = []
    for create in CREATORS:
        arena, problem = _try(create if rank == own[0] and not is_alone else None, exchange, rank, own)
        if not problem:
            return Agreement(arena, waiting, "", hosts)
        problems.append(problem)
    reason = f"memory cannot be shared: {'; '.join(problems)}"
    if members[0].wish == "shm" and len(hosts) == 1:
        raise ValueError(f"{VARIABLE}=shm, but {reason}")
    return Agreement(None, waiting, reason, hosts)


def _hosts(members: Sequence[Member]) -> tuple[tuple[int, ...], ...]:
    ranks: dict[str, list[int]] = {}
    for rank, member in enumerate(members):
        ranks.setdefault(member.boot, []).append(rank)
    return tuple(tuple(host) for host in ranks.values())


def _obstacle(members: Sequence[Member], hosts: Sequence[Sequence[int]], global_ranks: Sequence[int]) -> str:
    """Why the group cannot or should not share memory, as far as is known without trying."""
    wishes = {member.wish for member in members}
    if len(wishes) > 1:
        told = ", ".join(f"{global_ranks[rank]}: {member.wish}" for rank, member in enumerate(members))
        raise ValueError(f"{VARIABLE} is not the same on all ranks ({told})")
    if wishes == {"gloo"}:
        return f"{VARIABLE}=gloo"
    if len(hosts) > 1 and len(members) < LEAST_RANKS_PER_HOST * len(hosts):
        return f"its {len(members)} ranks are on {len(hosts)} hosts, where it is not faster"
    most = max(len(host) for host in hosts)
    obstacle = ""
    lacking = [(rank, member.lacks) for rank, member in enumerate(members) if member.lacks]
    if lacking:
        rank, lacks = lacking[0]
        obstacle = lacks if len(lacking) == len(members) else f"on rank {global_ranks[rank]} {lacks}"
    elif most > MAX_RANKS:
        obstacle = f"it serves at most {MAX_RANKS} ranks of one host, not {most}"
    elif not all(member.boot for member in members):
        obstacle = "it cannot be told whether the ranks are on one host"
    # between hosts gloo is part of the answer anyway
    if obstacle and wishes == {"shm"} and len(hosts) == 1:
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
    create: Callable[[int], Arena] | None, exchange: Exchange, rank: int, host: Sequence[int]
) -> tuple[Arena | None, str]:
    """One way to share memory: a host's first rank creates it, the others open it; all or none succeed."""
    arena, problem = None, ""
    if create is not None:
        try:
            arena = create(len(host))
        except OSError as error:
            problem = str(error)
    offers = exchange({"path": arena.path if arena else "", "chunk": arena.chunk if arena else 0})
    offer = offers[host[0]]
    if rank != host[0] and offer["path"]:
        try:
            arena = open_arena(offer["path"], offer["chunk"], host.index(rank), len(host))
        except OSError as error:
            problem = str(error)
    problems = [answer["problem"] for answer in exchange({"problem": problem[:200]})]
    if arena is not None and arena.has_name and create is not None:
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
