"""How many processors the ranks of this host have between them, and so how a rank should wait."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SPIN_SECONDS = 400e-6
"""How long a wait keeps its processor, if every rank has one for each of its threads."""
SHORT_SPIN_SECONDS = 1e-6
"""How long, if they have to share: then whoever is waited for may need this very processor."""
YIELD_SECONDS = 400e-6
"""How long a wait then offers its processor to others before it sleeps."""


@dataclass(frozen=True)
class Waiting:
    """How long a wait spins, then yields, before it sleeps; in seconds."""

    spin: float
    give_way: float


def own_processors() -> int:
    """The processors that this process may use, as a set of bits."""
    return sum(1 << number for number in os.sched_getaffinity(0))


def processor_quota() -> float:
    """Of how many processors the control group of this process gets the time; infinite if all."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def choose_waiting(
    processors: Sequence[int], threads: Sequence[int], neighbours: int, quota: float
) -> Waiting:
    """How the ranks of a group wait for each other.

    Args:
        processors: of each rank of the group, as sets of bits.
        threads: that each rank computes with.
        neighbours: number of ranks of the job on this host, if that is known; else 1.
        quota: see :func:`processor_quota`.
    """
    together = 0
    for one in processors:
        together |= one
    busy = max(sum(threads), neighbours * max(threads))
    if busy <= min(together.bit_count(), quota):
        return Waiting(SPIN_SECONDS, 0.0)
    return Waiting(SHORT_SPIN_SECONDS, YIELD_SECONDS)
