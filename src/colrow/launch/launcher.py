"""Starting ranks on this host, and ending all of them when one fails."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from torch._C._distributed_c10d import TCPStore

from colrow.launch.process import STACK_SECONDS, RankProcess, Reaper, Task
from colrow.launch.report import Failure, LaunchError, Outcome, Success
from colrow.launch.verdict import describe_exit, describe_stack, is_own, judge, name_ranks

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.05
SETTLE_SECONDS = 3.0
"""After the first failure, how long the other ranks may take to say what happened to them."""
BLAMED_SECONDS = 0.5
"""The same if all of those are already known to be dead or late."""
GRACE_SECONDS = 3.0
"""Between asking a rank to end and killing it."""
SHOW_CURSOR = "\x1b[?25h"


def launch(
    target: str,
    arguments: Mapping[str, Any] | None = None,
    ranks: int = 1,
    *,
    threads_per_rank: int | None = None,
    timeout: float | None = None,
    logs: str | Path | None = None,
) -> Any:
    """Run a function in ``ranks`` processes on this host that :func:`colrow.init_mesh` can join.

    Rank 0 has the terminal; what the others print goes to files. If a rank fails, all are ended within
    seconds, and so they are when this process ends, however it does.

    Args:
        target: the function, as ``"package.module:function"``; imported in each rank.
        arguments: its keyword arguments; pickled.
        ranks: number of processes.
        threads_per_rank: threads of each rank for computing; default: OMP_NUM_THREADS if that is set,
            else the cores that this process may use, divided by the ranks.
        timeout: seconds that the whole run may take; default: no limit.
        logs: folder for the output of ranks 1 and up, ``rank1.log`` and so on; default: a temporary one.

    Returns:
        What the function returned on rank 0; pickled on the way.

    Raises:
        ValueError: if an argument cannot be used.
        LaunchError: if a rank failed; its text is the cause, with the traceback of the rank at fault.
        KeyboardInterrupt: on Ctrl-C, after all ranks have ended.
        SystemExit: on SIGTERM or SIGHUP, with status 128 + the signal, after all ranks have ended.
    """
    _check(target, ranks, threads_per_rank, timeout)
    try:
        pickled = pickle.dumps(dict(arguments or {}))
    except Exception as error:
        raise ValueError(f"the arguments of {target} cannot be pickled: {error}") from error
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="colrow-")))
        folder = scratch if logs is None else Path(logs)
        folder.mkdir(parents=True, exist_ok=True)
        interruption = stack.enter_context(_Interruption())
        store = _host_store()
        reaper = stack.enter_context(Reaper())
        processes: list[RankProcess] = []
        stack.callback(_kill, processes)
        for rank in range(ranks):
            task = Task(target, pickled, tuple(sys.path), str(scratch / f"rank{rank}.stacks"))
            variables = rank_environment(os.environ, rank, ranks, store.port, threads_per_rank)
            processes.append(RankProcess(rank, task, variables, folder))
            reaper.watch(processes[-1])
        return _supervise(processes, interruption, timeout)


def rank_environment(
    environment: Mapping[str, str], rank: int, ranks: int, port: int, threads_per_rank: int | None
) -> dict[str, str]:
    """The environment of one rank: the launcher's own, and what ``torch.distributed`` needs."""
    variables = dict(environment)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # a rank that fails makes torch warn of each of its connections
    }
    for name, value in defaults.items():
        variables.setdefault(name, value)
    if threads_per_rank is not None:
        variables["OMP_NUM_THREADS"] = str(threads_per_rank)
    return variables | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, where no rank's death takes it away
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": f"colrow-{os.getpid()}-{port}",
    }


def _check(target: str, ranks: int, threads_per_rank: int | None, timeout: float | None) -> None:
    if not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise ValueError(f"target must be 'package.module:function', not {target!r}")
    if target.startswith("__main__:"):
        raise ValueError(
            f"{target}: the ranks cannot import the main program; put the function into a module"
        )
    for name, number in (("ranks", ranks), ("threads_per_rank", threads_per_rank)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"{name} must be a whole number, at least 1, not {number!r}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be positive seconds, not {timeout!r}")


def _host_store() -> TCPStore:
    """The job's key-value store, in this process, reachable from this host only."""
    listener = socket.create_server((LOOPBACK, 0), backlog=1024)
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _supervise(processes: list[RankProcess], interruption: _Interruption, timeout: float | None) -> Any:
    """Wait until all ranks have returned, or end them."""
    outcomes: dict[int, Outcome] = {}
    started = time.monotonic()
    failed: float | None = None
    while len(outcomes) < len(processes):
        wait([process.connection for process in processes if process.rank not in outcomes], POLL_SECONDS)
        for process in processes:
            outcome = process.poll()
            if outcome is not None:
                outcomes.setdefault(process.rank, outcome)
        if interruption.received is not None:
            _end(processes, interruption)
            interruption.raise_error()
        if failed is None and not all(isinstance(outcome, Success) for outcome in outcomes.values()):
            failed = time.monotonic()
        if failed is not None and time.monotonic() > failed + _settle_seconds(outcomes, len(processes)):
            break
        if timeout is not None and time.monotonic() > started + timeout:
            raise _time_is_up(processes, outcomes, timeout, interruption)
    if failed is not None:
        raise _failure(processes, outcomes, interruption)
    for process in processes:
        process.dismiss()
    while any(process.is_running for process in processes):
        if interruption.received is not None:
            _end(processes, interruption)
            interruption.raise_error()
        time.sleep(POLL_SECONDS / 5)
    for process in processes:
        code = process.wait()
        if code:
            warnings.warn(f"rank {process.rank} {describe_exit(code)} after its work was done", stacklevel=3)
    first = outcomes[0]
    assert isinstance(first, Success)
    return pickle.loads(first.value)


def _settle_seconds(outcomes: Mapping[int, Outcome], ranks: int) -> float:
    """How long to wait for the other ranks' outcomes; hardly, if only those are missing that others blame."""
    blamed: set[int] = set()
    for outcome in outcomes.values():
        if isinstance(outcome, Failure):
            blamed.update(outcome.blames or ())
    return BLAMED_SECONDS if set(range(ranks)) - set(outcomes) <= blamed else SETTLE_SECONDS


def _failure(
    processes: list[RankProcess], outcomes: dict[int, Outcome], interruption: _Interruption
) -> LaunchError:
    """End all ranks; the error that says why."""
    if not any(is_own(outcome) for outcome in outcomes.values()):
        _ask_for_stacks([process for process in processes if process.rank not in outcomes])
    _end(processes, interruption)
    tails = {process.rank: process.tail() for process in processes}
    stacks = {process.rank: process.stack() for process in processes}
    return judge(outcomes, len(processes), tails, stacks)


def _time_is_up(
    processes: list[RankProcess], outcomes: dict[int, Outcome], timeout: float, interruption: _Interruption
) -> LaunchError:
    """End all ranks; the error that says where they were."""
    running = [process for process in processes if process.rank not in outcomes]
    _ask_for_stacks(running)
    _end(processes, interruption)
    stacks = {process.rank: process.stack() for process in running}  # empty for one that is still starting
    detail = "\n\n".join(describe_stack(rank, stack) for rank, stack in stacks.items() if stack)
    names = name_ranks([process.rank for process in running])
    return LaunchError(f"{names} did not end within {timeout:g} s", detail, 1, None)


def _ask_for_stacks(running: list[RankProcess]) -> None:
    for process in running:
        process.ask_for_stacks()
    if running:
        time.sleep(STACK_SECONDS)


def _end(processes: list[RankProcess], interruption: _Interruption) -> None:
    """Ask all ranks to end, and kill those that do not within the grace or when the user insists."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while any(process.is_running for process in processes):
        if time.monotonic() > deadline or interruption.insists:
            break
        time.sleep(POLL_SECONDS / 5)
    was_killed = processes[0].is_running
    _kill(processes)
    if was_killed and sys.stdout.isatty():
        print(end=SHOW_CURSOR, flush=True)  # a progress display of rank 0 had no chance to


def _kill(processes: list[RankProcess]) -> None:
    for process in processes:
        process.kill()


class _Interruption:
    """Notes SIGINT, SIGTERM and SIGHUP instead of acting at once; in the main thread only."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.insists = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.insists = self.received is not None
        self.received = self.received or number

    def raise_error(self) -> None:
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.received or 0))
