"""Making a shared-memory group out of a gloo one."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import PrefixStore

from colrow.transport.across import Across
from colrow.transport.agreement import Agreement, agree
from colrow.transport.group import SharedGroup
from colrow.transport.hierarchy import HierarchicalGroup

Memory: TypeAlias = SharedGroup | HierarchicalGroup
"""What ranks of one host, or of several, have in common."""

RECORD_BYTES = 2048
"""What a rank tells the others at once, as JSON padded with spaces."""


def join(gloo: Any, store: Store, rank: int, global_ranks: Sequence[int]) -> Memory | None:
    """Share memory with the other ranks of a gloo backend, those of each host among themselves, if all can.

    Collective; takes four small gloo collectives. The first rank of the job says on stderr what came of it.

    Args:
        gloo: the group's ``ProcessGroupGloo``; its timeout, whatever it is set to later, is the group's.
        store: the group's.
        rank: this process's rank in the group.
        global_ranks: the members' job-wide ranks.

    Returns:
        The group, or ``None`` if gloo is to be used.

    Raises:
        ValueError: if ``COLROW_TRANSPORT`` is wrong, asks for what is impossible, or differs between ranks.
        RuntimeError: if gloo fails.
    """
    size = len(global_ranks)

    def exchange(record: dict[str, Any]) -> list[dict[str, Any]]:
        text = json.dumps(record).encode().ljust(RECORD_BYTES)
        assert len(text) == RECORD_BYTES, record
        parts = [torch.empty(RECORD_BYTES, dtype=torch.uint8) for _ in range(size)]
        gloo.allgather([parts], [torch.frombuffer(bytearray(text), dtype=torch.uint8)]).wait()
        return [json.loads(bytes(part.tolist())) for part in parts]

    agreement = agree(exchange, rank, global_ranks)
    if dist.is_initialized() and dist.get_rank() == 0:
        _say(_describe(agreement))
    return None if agreement.reason else _make(agreement, gloo, store, rank, global_ranks)


def _make(agreement: Agreement, gloo: Any, store: Store, rank: int, global_ranks: Sequence[int]) -> Memory:
    def timeout() -> float:
        seconds: float = gloo.options._timeout.total_seconds()
        return seconds

    hosts = agreement.hosts
    host = next(number for number, ranks in enumerate(hosts) if rank in ranks)
    neighbours = [global_ranks[one] for one in hosts[host]]
    inside = None
    if agreement.arena is not None:
        inside = SharedGroup(agreement, hosts[host].index(rank), neighbours, timeout)
    if len(hosts) == 1:
        assert inside is not None
        return inside

    def make_across(number: int) -> Across:
        carriers = [global_ranks[ranks[number]] for ranks in hosts]
        return Across(PrefixStore(f"carriers {number}", store), host, carriers, timeout)

    return HierarchicalGroup(inside, make_across, gloo, rank, global_ranks, hosts)


def _describe(agreement: Agreement) -> str:
    if agreement.reason:
        return f"colrow: ranks communicate through gloo: {agreement.reason}"
    from colrow.transport import _native

    sums, hosts = f"{_native.KERNELS} sums", len(agreement.hosts)
    if hosts == 1:
        return f"colrow: ranks communicate through shared memory: they are on one host ({sums})"
    return f"colrow: ranks communicate through shared memory on each of {hosts} hosts, gloo between ({sums})"


@functools.cache
def _say(line: str) -> None:
    """Print a line, once per process."""
    print(line, file=sys.stderr, flush=True)
