"""Joining the job's process group, so that a rank which does not come is named."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from colrow.collectives.notices import is_store_with_launcher
from colrow.collectives.process import has_died, identify
from colrow.errors import RankFailure

LABEL = "init_mesh"
LINGER_SECONDS = 2.0
"""How long the rank that hosts the store stays when joining has failed."""


def join_job(backend: str, limit: timedelta) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    May be called again after ``destroy_process_group``, on all ranks alike.

    Raises:
        ValueError: if a variable is missing or the port is taken.
        RankFailure: if another rank does not come within the limit.
    """
    rank, size = _whole(os.environ, "RANK"), _whole(os.environ, "WORLD_SIZE")
    server = _connect(rank, size, limit)
    # a launcher's store outlives a process group, and all processes of a job that are started again: the
    # next ones must not read the addresses of the last
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    generation = server.add(f"colrow/joins/{again}/{rank}", 1)
    store = PrefixStore(f"colrow/job {again}/{generation}", server)
    arrivals = PrefixStore("arrivals", store)
    arrivals.set(str(rank), json.dumps(identify(os.getpid())))
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:
        raise _missing(error, arrivals, rank, size, limit) from error


def _connect(rank: int, size: int, limit: timedelta) -> TCPStore:
    """The job's key-value store, hosted by the launcher or else by rank 0."""
    address, port = _text(os.environ, "MASTER_ADDR"), _whole(os.environ, "MASTER_PORT")
    hosts = rank == 0 and not is_store_with_launcher()
    try:
        return TCPStore(
            address,
            port,
            size,
            is_master=hosts,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=not is_store_with_launcher(),
        )
    except RuntimeError as error:
        if hosts:
            raise ValueError(
                f"rank 0 cannot listen on port {port} of this host (another job may): "
                f"give all ranks another MASTER_PORT"
            ) from error
        host = "the launcher" if is_store_with_launcher() else "rank 0"
        message = (
            f"{LABEL} did not complete on rank {rank}: nobody listens at {address}:{port} within "
            f"{limit.total_seconds():g} s, where {host} should host the job's key-value store"
        )
        raise RankFailure(message, () if is_store_with_launcher() else (0,), LABEL) from error


def _missing(
    error: RuntimeError, arrivals: PrefixStore, rank: int, size: int, limit: timedelta
) -> RankFailure:
    """Names the ranks that have not come, or have come and died."""
    guilty: tuple[int, ...]
    try:
        absent = tuple(other for other in range(size) if not arrivals.check([str(other)]))
        came = {other: json.loads(arrivals.get(str(other))) for other in range(size) if other not in absent}
        died = tuple(other for other in came if has_died(came[other]))
        guilty = absent or died
        who = f"never joined: {_list(absent)}" if absent else f"died: {_list(died)}"
        if not guilty:
            who = "all ranks have joined, but not all can be reached over the network"
    except RuntimeError:
        guilty = () if is_store_with_launcher() else (0,)
        who = (
            "the job's key-value store is gone: "
            + ("the launcher" if not guilty else "rank 0")
            + " has ended"
        )
    if rank == 0 and not is_store_with_launcher():
        time.sleep(LINGER_SECONDS)  # the others read the same store, which ends with this process
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    message = f"{LABEL} did not complete on rank {rank} within {limit.total_seconds():g} s: {who} ({cause})"
    return RankFailure(message, guilty, LABEL)


def _list(ranks: tuple[int, ...]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _text(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise ValueError(
            f"the environment variable {name} is not set although RANK is: start the ranks with torchrun "
            f"or colrow, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
        )
    return value


def _whole(environment: Mapping[str, str], name: str) -> int:
    value = _text(environment, name)
    if not value.isdecimal():
        raise ValueError(f"the environment variable {name} must be a whole number, not {value!r}")
    return int(value)
