"""A worker program for the tests of the benchmark: no model, but it answers, fails, dies or hangs as told.

``FAULT`` is ``WHAT:WHEN:RANK``, such as ``dies:steps:1``; without it all is well.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.peers.systems.worker import serve


class Worker:
    """Answers as a real one does, without work."""

    def __init__(self, system: str) -> None:
        self._system = system
        self._rank = int(os.environ.get("RANK", "0"))

    def build(self) -> dict[str, Any]:
        self._perhaps_fail("build")
        return {"notes": [f"threads {os.environ['OMP_NUM_THREADS']}"]}

    def steps(self, count: int) -> dict[str, Any]:
        self._perhaps_fail("steps")
        times = [0.01 * (1 + self._rank)] * count
        return {"seconds": times, "cpu_seconds": times, "cpu_total": sum(times), "losses": [2.0] * count}

    def report(self) -> dict[str, Any]:
        self._perhaps_fail("report")
        return {"peak_mb": 10.0 + self._rank, "collectives": 3, "bytes": 300}

    def _perhaps_fail(self, now: str) -> None:
        what, when, rank = os.environ.get("FAULT", "nothing:never:0").split(":")
        if now != when:
            return
        if self._rank != int(rank):
            if what == "raises":  # as ranks do that wait for the one that failed
                raise RuntimeError("Connection closed by peer")
            return
        if what == "raises":
            raise ValueError("heads do not divide")
        if what == "dies":
            print("something terrible", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "hangs":
            time.sleep(1000)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("system", "case", "folder"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--connection", type=int)
    options = parser.parse_args()
    serve(Connection(options.connection), lambda: Worker(options.system))


if __name__ == "__main__":
    main()
