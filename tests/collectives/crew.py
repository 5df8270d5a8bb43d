"""Fresh processes for tests in which ranks die; forked from the pools' server, so that they start quickly."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from colrow.errors import RankFailure


@dataclass(frozen=True)
class End:
    """How a rank ended.

    Attributes:
        code: exit status, negative for a signal.
        result: what the function returned.
        ranks: of the RankFailure that it raised, and so on.
        seconds: that the function took until then, as told by :func:`timed`.
    """

    code: int
    result: Any = None
    ranks: tuple[int, ...] | None = None
    label: str = ""
    message: str = ""
    seconds: float = 0.0


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Notes in a RankFailure how long it took to be raised."""
    begin = time.monotonic()
    try:
        yield
    except RankFailure as failure:
        failure.add_note(str(time.monotonic() - begin))
        raise


def _serve(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], ours: Connection
) -> None:
    os.environ.update(environment)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    report: dict[str, Any]
    try:
        report = {"result": function(*arguments)}
    except RankFailure as failure:
        report = {"ranks": failure.ranks, "label": failure.label, "message": str(failure)}
        report["seconds"] = float(getattr(failure, "__notes__", ["0"])[0])
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as for any main program
        os._exit(1)
    ours.send_bytes(json.dumps(report).encode())
    if "result" in report and dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)


def run(
    function: Callable[..., Any],
    *arguments: Any,
    size: int,
    first_rank_hosts: bool = False,
    absent: tuple[int, ...] = (),
    stuck: tuple[int, ...] = (),
    limit: float = 40.0,
) -> list[End]:
    """How each rank ended.

    Args:
        function: what every rank calls; module-level.
        arguments: for the function; must be picklable, the result as JSON.
        size: number of ranks.
        first_rank_hosts: rank 0 hosts the key-value store, as under a plain launcher; else this process does.
        absent: ranks that are not started.
        stuck: ranks that are killed when the others have ended.
        limit: seconds after which ranks that still run are killed.
    """
    context = multiprocessing.get_context("forkserver")
    environment = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    store = None
    if first_rank_hosts:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    else:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
    connections, processes = {}, {}
    for rank in range(size):
        if rank in absent:
            continue
        connections[rank], theirs = context.Pipe(duplex=False)
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes[rank] = context.Process(target=_serve, args=(function, arguments, own, theirs), daemon=True)
        processes[rank].start()
        theirs.close()
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if all(process.exitcode is not None for rank, process in processes.items() if rank not in stuck):
            break
        time.sleep(0.02)
    late = [rank for rank, process in processes.items() if process.exitcode is None]
    for rank in late:
        processes[rank].kill()
        processes[rank].join()
    assert set(late) <= set(stuck), f"ranks {late} still ran after {limit} s"
    return [_end(process.exitcode or 0, connections[rank]) for rank, process in processes.items()]


def _end(code: int, connection: Connection) -> End:
    report: dict[str, Any] = {}
    with contextlib.suppress(EOFError):
        if connection.poll():
            report = json.loads(connection.recv_bytes())
    if "ranks" in report:
        report["ranks"] = tuple(report["ranks"])
    return End(code, **report)
