"""What happens to one model: built, traced, planned, and verified on ranks that are forked with it."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

import colrow
from colrow.axes import infer
from colrow.trace import trace
from coverage_processes import Report, describe, end_with_parent
from coverage_verify import derive, verify

COLLECTIVE_SECONDS = 60.0
SETTLE_SECONDS = 2.0
"""After the first failure of a rank, how long the others may take to say what happened to them."""


def load(builders: Path) -> ModuleType:
    """The module of a file, which may import others from its own folder."""
    sys.path.insert(0, str(builders.parent))
    specification = importlib.util.spec_from_file_location("coverage_builders", builders)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def names_of(builders: Path) -> list[str]:
    """What the file's ``names()`` returns."""
    return [str(name) for name in load(builders).names()]


def run(builders: Path, name: str, ranks: int, report: Report) -> None:
    """Bring one model as far as it gets, reporting on the way."""
    torch.set_num_threads(1)
    model, inputs = load(builders).build(name)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    report(stage="trace", parameters=sum(sizes.values()))
    mode = "training" if model.training else "evaluation"
    record = trace(model, (), inputs, mode=mode, routing="guess")
    report(stage="plan", traced=True, notes=record.warnings, unknown=sorted(infer(record).unknown))
    plan = derive(model, inputs, ranks)
    cut = sum(size for name, size in sizes.items() if name in plan.parameters)
    notes = [*record.warnings, *plan.notes]
    report(stage="verify", planned=True, share_cut=cut / max(1, sum(sizes.values())), notes=notes)
    difference = on_ranks(ranks, lambda mesh: verify(model, inputs, plan, mesh))
    report(stage="done", exact=not difference, first_difference=difference)


def on_ranks(ranks: int, function: Callable[[Any], str]) -> str:
    """What ``function(mesh)`` returns on rank 0 of so many forked processes.

    Raises:
        RuntimeError: if a rank raises or dies.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        connections: list[Connection] = []
        for rank in range(ranks):
            ours, theirs = Pipe()
            parent = os.getpid()
            if os.fork() == 0:
                end_with_parent(parent)
                _serve(rank, ranks, listener, theirs, function)
            theirs.close()
            connections.append(ours)
    return _collect(connections)


def _serve(
    rank: int, size: int, listener: socket.socket, connection: Connection, function: Callable[[Any], str]
) -> None:
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        port = listener.getsockname()[1]
        hosted: dict[str, Any] = {"is_master": False}
        if rank == 0:
            hosted = {"is_master": True, "master_listen_fd": listener.detach(), "wait_for_workers": False}
        store = TCPStore("127.0.0.1", port, **hosted)
        limit = timedelta(seconds=COLLECTIVE_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        mesh = colrow.init_mesh(tp=size, device="cpu", timeout=COLLECTIVE_SECONDS)
        answer = (True, function(mesh))
        dist.barrier()  # rank 0 hosts the store: it is the last to leave
    except BaseException as error:
        answer = (False, describe(error))
    connection.send(answer)
    os._exit(0)


def _collect(connections: list[Connection]) -> str:
    """Rank 0's answer, once all ranks have answered."""
    answers: dict[int, str] = {}
    errors: dict[int, str] = {}
    deadline = float("inf")
    while len(answers) + len(errors) < len(connections) and time.monotonic() < deadline:
        open_ = {c: rank for rank, c in enumerate(connections) if rank not in answers and rank not in errors}
        for connection in wait(list(open_), timeout=0.1):
            assert isinstance(connection, Connection)
            try:
                passed, text = connection.recv()
            except EOFError:
                passed, text = False, "the process died"
            (answers if passed else errors)[open_[connection]] = text
        if errors:
            deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
    if errors:
        # a rank that only noticed another's failure says less than the one that failed
        rank, text = min(errors.items(), key=lambda item: ("RankFailure" in item[1], item[0]))
        raise RuntimeError(f"rank {rank}: {text}")
    return answers[0]
