"""The processes of one system: started, asked, and ended together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from .environment import ROOT
from .shapes import Case
from .systems import System

SETTLE_SECONDS = 2.0
"""After the first failure of a rank, how long the others may take to say what happened to them."""
NOTICED = ("RankFailure", "DistBackendError", "Connection closed by peer", "Connection reset")
"""Of errors that say only that another rank failed."""


class SystemFailure(RuntimeError):
    """A system failed: one of its ranks raised, died, or did not answer in time."""


class Ranks(Protocol):
    """What answers for one system."""

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """The answers of all ranks, in rank order.

        Raises:
            SystemFailure: if a rank raises, dies or is too late.
        """

    def printed(self, start: str) -> list[str]:
        """The different lines beginning so that the first rank has printed."""

    def close(self) -> None:
        """End whatever runs."""


@dataclass(frozen=True)
class Place:
    """Where systems run.

    Attributes:
        python: the interpreter that has all systems.
        models: the folder with the weights.
        logs: the folder for what the processes print.
        timeout: seconds that a rank may take for one answer.
        environment: variables for all systems.
        program: arguments of the interpreter that start a worker.
    """

    python: Path
    models: Path
    logs: Path
    timeout: float
    environment: Mapping[str, str]
    program: tuple[str, ...] = ("-m", "benchmarks.peers.systems.worker")


class Group:
    """The processes of one system, one for each rank."""

    def __init__(self, system: System, case: Case, place: Place) -> None:
        self._system, self._timeout = system, place.timeout
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []
        port = _free_port()
        place.logs.mkdir(parents=True, exist_ok=True)
        for rank in range(system.ranks(case.ranks)):
            self._start(rank, port, case, place)

    def _start(self, rank: int, port: int, case: Case, place: Place) -> None:
        log = place.logs / f"{case.key}.{self._system.name}.{rank}.log"
        ours, theirs = Pipe()
        command = [str(place.python), *place.program, "--system", self._system.base]
        command += ["--case", json.dumps(case.to_json()), "--folder", str(place.models)]
        command += ["--connection", str(theirs.fileno())]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=worker_environment(self._system, rank, port, case, place.environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # what it starts, such as a compiler, ends with it
            )
        theirs.close()
        self._connections.append(ours)
        self._processes.append(process)
        self._logs.append(log)

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        request = json.dumps({"do": do, **arguments}).encode()
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it has died: the answer will say so
                connection.send_bytes(request)
        return self._answers(do)

    def _answers(self, do: str) -> list[dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + self._timeout
        while len(answers) + len(errors) < len(self._connections) and time.monotonic() < deadline:
            open_ = {
                connection: rank
                for rank, connection in enumerate(self._connections)
                if rank not in answers and rank not in errors
            }
            for ready in wait(list(open_), timeout=max(0.0, deadline - time.monotonic())):
                assert isinstance(ready, Connection)
                rank = open_[ready]
                answer = self._answer(rank)
                if "error" in answer:
                    errors[rank] = answer["error"]
                else:
                    answers[rank] = answer
            if errors:
                deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
        if errors:
            # a rank that only noticed another's failure says less than the one that failed
            rank = min(errors, key=lambda one: (any(word in errors[one] for word in NOTICED), one))
            raise SystemFailure(f"{errors[rank]} (rank {rank}, {do})")
        if len(answers) < len(self._connections):
            missing = [rank for rank in range(len(self._connections)) if rank not in answers]
            raise SystemFailure(f"no answer from rank {missing[0]} within {self._timeout:g} s ({do})")
        return [answers[rank] for rank in range(len(self._connections))]

    def _answer(self, rank: int) -> dict[str, Any]:
        try:
            answer = json.loads(self._connections[rank].recv_bytes())
            assert isinstance(answer, dict)
        except (EOFError, OSError):
            code = self._processes[rank].wait()
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            answer = {"error": f"the process {how}{_last_line(self._logs[rank])}"}
        if "trail" in answer:
            with self._logs[rank].open("a") as log:
                log.write(answer["trail"])
        return answer

    def printed(self, start: str) -> list[str]:
        lines = self._logs[0].read_text(errors="replace").splitlines()
        return list(dict.fromkeys(line for line in lines if line.startswith(start)))

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for connection in self._connections:
            connection.close()


def worker_environment(
    system: System, rank: int, port: int, case: Case, given: Mapping[str, str]
) -> dict[str, str]:
    """The variables of one rank: of this process, of all systems, of the job, and of the system."""
    ranks = system.ranks(case.ranks)
    job = {}
    if not system.is_single:
        job = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "LOCAL_SIZE": ranks,  # by this name DeepSpeed looks for it
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
        }
    inherited = {name: value for name, value in os.environ.items() if name not in job}
    common = {
        "OMP_NUM_THREADS": str(system.threads),
        "MKL_NUM_THREADS": str(system.threads),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {
        **inherited,
        **given,
        **common,
        **{name: str(value) for name, value in job.items()},
        **dict(system.settings),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _last_line(log: Path) -> str:
    lines: Sequence[str] = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1].strip()}" if lines else ""
