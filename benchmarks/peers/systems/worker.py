"""A process of one system: builds it, then does steps when it is asked to.

    python -m benchmarks.peers.systems.worker --system colrow --case '{...}' --folder models --connection 5

Requests and answers are JSON on the inherited connection, one answer for each request:

    {"do": "build"}
        {"notes": [...]}
    {"do": "steps", "count": 3}
        {"seconds": [...], "cpu_seconds": [...], "cpu_total": 1.5, "losses": [...]}
    {"do": "report"}  (does one step more)
        {"peak_mb": 700.0, "collectives": 20, "bytes": 37800000}

or ``{"error": "the last line", "trail": "the traceback"}``, after which the process ends. It ends too when
the connection is closed. It uses no core while it waits for a request.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


class Worker:
    """Answers requests for one system."""

    def __init__(self, system: str, case: str, folder: Path) -> None:
        import torch

        from ..shapes import Case
        from . import PROGRAMS

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._case = Case.from_json(json.loads(case))
        self._folder = folder
        self._module = importlib.import_module(f".{PROGRAMS[system]}", __package__)
        self._own_megabytes = start_of_peak()
        self._trainer: Any = None
        self._steps = 0

    def build(self) -> dict[str, Any]:
        self._trainer = self._module.build(self._case, self._folder)
        return {"notes": self._trainer.notes}

    def steps(self, count: int) -> dict[str, Any]:
        """Train so many steps; the ranks start each of them together."""
        seconds, cpu_seconds, losses = [], [], []
        cpu_first = time.process_time()
        for _ in range(count):
            tokens = self._next_batch()
            self._trainer.wait_for_others()
            cpu_begin, begin = time.process_time(), time.perf_counter()
            loss = self._trainer.step(tokens)
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu_begin)
            losses.append(float(loss))
        cpu_total = time.process_time() - cpu_first
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "cpu_total": cpu_total, "losses": losses}

    def report(self) -> dict[str, Any]:
        peak = peak_megabytes()  # before the step that is counted, which needs more
        moved = self._trainer.count(self._next_batch())
        return {
            "peak_mb": peak - self._own_megabytes,
            "collectives": moved.collectives,
            "bytes": moved.bytes,
        }

    def _next_batch(self) -> Any:
        from .trainer import batch

        self._steps += 1
        return batch(self._case, self._steps - 1)


def start_of_peak() -> float:
    """Resident megabytes now; from now on the kernel's peak counts anew, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or peak_megabytes()


def peak_megabytes() -> float:
    """Highest resident memory so far."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _status(field: str) -> float | None:
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else None


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it has ended, also in a collective."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(connection: Connection, start: Callable[[], Any]) -> None:
    """Answer requests with the methods of what ``start()`` returns, until one fails or none can come."""
    try:
        worker = start()
        while True:
            request = json.loads(connection.recv_bytes())
            answer = getattr(worker, request.pop("do"))(**request)
            connection.send_bytes(json.dumps(answer).encode())
    except EOFError:
        return
    except BaseException as error:
        lines = traceback.format_exception_only(error)
        problem = {"error": " ".join("".join(lines).split()), "trail": traceback.format_exc()}
        connection.send_bytes(json.dumps(problem).encode())


def be_killed_first() -> None:
    """If memory runs out, have the kernel end one of these processes and nobody else's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")


def main() -> None:
    end_with_parent()
    be_killed_first()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--system", required=True)
    parser.add_argument("--case", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--connection", type=int, required=True)
    options = parser.parse_args()
    connection = Connection(options.connection)
    serve(connection, lambda: Worker(options.system, options.case, options.folder))
    sys.stdout.flush()
    os._exit(0)  # process groups would wait for ranks that have gone


if __name__ == "__main__":
    main()
