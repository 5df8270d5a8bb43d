"""Pools of worker processes, one rank each, kept between tests.

``ranks(n).run(function, *arguments)`` calls a module-level function on n ranks that share a real gloo
process group and returns their results in rank order. An exception on any rank fails the test with that
rank's traceback, and the pool is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import colrow

COLLECTIVE_SECONDS = 60.0
_meshes: dict[tuple[int, int, int, int], DeviceMesh] = {}


def worker_mesh(tp: int, dp: int = 1, pp: int = 1, ep: int = 1, cp: int = 1) -> DeviceMesh:
    """In a worker: the mesh of this shape, made once per pool."""
    sizes = (tp, dp, pp, ep, cp)
    if sizes not in _meshes:
        limit = COLLECTIVE_SECONDS
        _meshes[sizes] = colrow.init_mesh(tp, dp, pp=pp, ep=ep, cp=cp, device="cpu", timeout=limit)
    return _meshes[sizes]


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    limit = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            function, arguments = pickle.loads(job)
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float32)
            colrow.reset_comm_stats()
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


class RankError(AssertionError):
    """A rank of the pool raised; carries its traceback."""


class Pool:
    """``size`` worker processes with one process group among them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.alive = True
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            [
                "torch",
                "colrow",
                "transformers.models.llama.modeling_llama",
                "transformers.models.gpt2.modeling_gpt2",
                "transformers.models.bert.modeling_bert",
            ]
        )
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """Results of ``function(*arguments)`` on every rank, in rank order."""
        job = pickle.dumps((function, arguments))
        for connection in self._connections:
            connection.send_bytes(job)
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(results) + len(errors) < self.size and time.monotonic() < deadline:
            waiting = [c for r, c in enumerate(self._connections) if r not in results and r not in errors]
            for connection in wait(waiting, timeout=0.2):
                rank = self._connections.index(connection)  # type: ignore[arg-type]
                try:
                    passed, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    passed, value = False, "the process died"
                (results if passed else errors)[rank] = value
            if errors:  # the others may wait for this rank: give them a moment only
                deadline = min(deadline, time.monotonic() + 1.0)
        if len(results) == self.size:
            return [results[rank] for rank in range(self.size)]
        self.close()
        # a rank that only noticed another's failure says less than the one that failed
        rank, text = min(
            errors.items(),
            key=lambda item: "RankFailure" in item[1],
            default=(-1, "no rank answered in time"),
        )
        raise RankError(f"rank {rank} of {self.size}:\n{text}")

    def close(self) -> None:
        """End the workers at once."""
        self.alive = False
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
