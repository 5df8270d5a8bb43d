"""Making a shared-memory group out of a gloo one."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from colrow.transport.agreement import agree
from colrow.transport.group import SharedGroup

RECORD_BYTES = 2048
"""What a rank tells the others at once, as JSON padded with spaces."""


def join(gloo: Any, rank: int, global_ranks: Sequence[int]) -> SharedGroup | None:
    """Share memory with the other ranks of a gloo backend, if all of them can.

    Collective; takes four small gloo collectives. The first rank of the job says on stderr what came of it.

    Args:
        gloo: the group's ``ProcessGroupGloo``; its timeout, whatever it is set to later, is the group's.
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

    agreement = agree(exchange, rank, size, global_ranks)
    group = None
    if agreement.arena is not None:
        group = SharedGroup(agreement, rank, global_ranks, lambda: gloo.options._timeout.total_seconds())
    if dist.is_initialized() and dist.get_rank() == 0:
        _say(_describe(group, agreement.reason))
    return group


def _describe(group: SharedGroup | None, reason: str) -> str:
    if group is None:
        return f"colrow: ranks communicate through gloo: {reason}"
    from colrow.transport import _native

    return f"colrow: ranks communicate through shared memory: they are on one host ({_native.KERNELS} sums)"


@functools.cache
def _say(line: str) -> None:
    """Print a line, once per process."""
    print(line, file=sys.stderr, flush=True)
