"""The program of one rank: ``python -m colrow.launch.worker FILE_DESCRIPTOR LAUNCHER``.

Takes its task from the launcher over the connection with that file descriptor, runs it and reports how it
ended. The process ends with the launcher, however that one ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist

from colrow.collectives.failure import report_exception
from colrow.launch.process import STACK_SIGNAL, Task
from colrow.launch.report import Success, failure_of

LEAVE_SECONDS = 1.0
"""How long a rank that has returned waits for the others before it closes its connections to them."""
PR_SET_PDEATHSIG = 1


class Terminated(SystemExit):
    """The launcher has told this rank to end; unwinds the stack so that files and displays are closed."""


def main() -> None:
    """Run the task, report, and end the process."""
    connection = Connection(int(sys.argv[1]))
    _die_with(int(sys.argv[2]))
    task: Task = pickle.loads(connection.recv_bytes())
    dismissed = _watch_launcher(connection)
    signal.signal(signal.SIGTERM, _terminate)
    stacks = open(task.stack_file, "w")  # noqa: SIM115 - open as long as this process runs
    faulthandler.enable(stacks)
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    sys.path[:] = task.path
    try:
        report = _run(task)
    except BaseException as error:
        if isinstance(error, Terminated) or not isinstance(error, SystemExit) or error.code:
            _end_with_failure(connection, error)
        report = Success(pickle.dumps(None))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the work is done; the launcher has SIGKILL
    connection.send_bytes(pickle.dumps(report))
    dismissed.wait(LEAVE_SECONDS)
    if dist.is_initialized():
        dist.destroy_process_group()


def _run(task: Task) -> Success:
    function = _find(task.target)
    value = function(**pickle.loads(task.arguments))
    if os.environ["RANK"] != "0":
        return Success()
    try:
        return Success(pickle.dumps(value))
    except Exception as error:
        raise TypeError(f"what {task.target} returns cannot be pickled: {error}") from error


def _find(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _end_with_failure(connection: Connection, error: BaseException) -> NoReturn:
    """Tell the other ranks and the launcher, then end at once.

    No interpreter shutdown: destructors of collectives under way would wait for ranks that never come,
    while those wait for this process's connections to close.
    """
    is_order = isinstance(error, Terminated)
    if not is_order:
        with contextlib.suppress(Exception):
            error = report_exception(error)
    with contextlib.suppress(OSError):
        connection.send_bytes(pickle.dumps(failure_of(error, __file__, is_order)))
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated(128 + number)


def _die_with(launcher: int) -> None:
    """Have the kernel end this process when the launcher ends, even if Python is stuck; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)


def _watch_launcher(connection: Connection) -> threading.Event:
    """End this process and its children when the launcher closes the connection; set when it dismisses us."""
    dismissed = threading.Event()

    def watch() -> None:
        try:
            while True:
                connection.recv_bytes()
                dismissed.set()
        except (EOFError, OSError):
            if os.getpgrp() == os.getpid():
                os.killpg(0, signal.SIGKILL)
            os._exit(1)

    threading.Thread(target=watch, name="colrow-launcher", daemon=True).start()
    return dismissed


if __name__ == "__main__":
    main()
