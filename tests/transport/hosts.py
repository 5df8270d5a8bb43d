"""Several hosts on one machine: ranks that tell each other that they run under different kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch.distributed as dist

from colrow.transport import HierarchicalGroup, agreement, share_memory

GROUPS: dict[tuple[int, ...], HierarchicalGroup] = {}
"""Of a worker of the pool: made once."""


@contextlib.contextmanager
def on_hosts(hosts: Sequence[int]) -> Iterator[None]:
    """This rank says that it is on ``hosts[rank]`` to groups whose first collective is in this context.

    They share memory however few ranks are on a host.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "own_host", lambda: f"host {hosts[dist.get_rank()]}")
        patch.setattr(agreement, "LEAST_RANKS_PER_HOST", 1)
        yield


def group_on(hosts: tuple[int, ...]) -> HierarchicalGroup:
    """In a worker: a group of all ranks, each on the host of this number."""
    if hosts not in GROUPS:
        group = dist.new_group(backend="gloo")
        with on_hosts(hosts):
            memory = share_memory(group)
        assert isinstance(memory, HierarchicalGroup)
        GROUPS[hosts] = memory
    return GROUPS[hosts]
