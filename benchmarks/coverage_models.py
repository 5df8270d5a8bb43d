"""What happens to one model: built, traced, planned, and verified on ranks that are forked with it."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.axes import infer
from colrow.plan import Plan
from colrow.plan.derive import derive_plan, record
from colrow.trace import Example
from colrow.verify import one_precision, verify_on_ranks
from coverage_processes import RankError, Report, describe, end_with_parent

COUNTED = "collectives"
"""What verify calls the comparison of the collectives that were counted with those that were predicted."""
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
    module = load(builders)
    model, inputs = module.build(name)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    report(stage="run", parameters=sum(sizes.values()))
    with torch.no_grad(), one_precision():
        model(**inputs)  # some models take on their form when they are first called
    report(stage="trace", runs=True)
    examples = {"training" if model.training else "evaluation": Example((), inputs)}
    trace = record(model, examples)
    report(stage="plan", traced=True, notes=trace.warnings, unknown=sorted(infer(trace).unknown))
    plan = derive_plan(model, examples, ranks)
    cut = sum(size for name, size in sizes.items() if name in plan.parameters)
    notes = [*trace.warnings, *plan.notes]
    report(stage="verify", planned=True, share_cut=cut / max(1, sum(sizes.values())), notes=notes)
    report(**on_ranks(ranks, lambda mesh: _verify(model, examples, plan, mesh)), stage="done")


def _verify(
    model: nn.Module, examples: Mapping[str, Example], plan: Plan, mesh: DeviceMesh
) -> dict[str, Any]:
    found = verify_on_ranks(model, examples, mesh, plan)
    if found.passed:
        return {"exact": True, "predicted": True}
    causes = [str(cause) for cause in (found.difference, *found.failed) if cause is not None]
    difference = causes[0] if causes else "nothing was compared"
    kinds = {check.kind for check in found.failed}
    return {
        "exact": bool(found.checks) and found.difference is None and kinds <= {COUNTED},
        "predicted": COUNTED not in kinds,
        "first_difference": difference.removeprefix("first difference: "),
        "detail": str(found),
    }


def on_ranks(ranks: int, function: Callable[[DeviceMesh], dict[str, Any]]) -> dict[str, Any]:
    """What ``function(mesh)`` returns on rank 0 of so many forked processes.

    Raises:
        RankError: if a rank raises or dies.
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
    rank: int,
    size: int,
    listener: socket.socket,
    connection: Connection,
    function: Callable[[DeviceMesh], dict[str, Any]],
) -> None:
    answer: tuple[bool, Any]
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
        answer = (False, (describe(error), traceback.format_exc()))
    connection.send(answer)
    os._exit(0)


def _collect(connections: list[Connection]) -> dict[str, Any]:
    """Rank 0's answer, once all ranks have answered."""
    answers: dict[int, dict[str, Any]] = {}
    errors: dict[int, tuple[str, str]] = {}
    deadline = float("inf")
    while len(answers) + len(errors) < len(connections) and time.monotonic() < deadline:
        open_ = {c: rank for rank, c in enumerate(connections) if rank not in answers and rank not in errors}
        for connection in wait(list(open_), timeout=0.1):
            assert isinstance(connection, Connection)
            rank = open_[connection]
            try:
                passed, said = connection.recv()
            except EOFError:
                passed, said = False, ("the process died", "")
            if passed:
                answers[rank] = said
            else:
                errors[rank] = said
        if errors:
            deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
    if errors:
        # a rank that only noticed another's failure says less than the one that failed
        rank, (text, trail) = min(errors.items(), key=lambda item: ("RankFailure" in item[1][0], item[0]))
        raise RankError(f"rank {rank}: {text}", trail)
    return answers[0]
