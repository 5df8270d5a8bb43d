"""Processes for single models: forked with everything imported, watched, and ended as a group."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from coverage_rows import Row

PRELOADED = (
    "torch",
    "torch.distributed",
    "colrow",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
)
"""Imported once instead of by every model; what is not installed is left out."""
TAIL_BYTES = 4000
PR_SET_PDEATHSIG = 1

Report = Callable[..., None]


class RankError(Exception):
    """A process that belongs to this one raised or died.

    Attributes:
        trail: its traceback.
    """

    def __init__(self, text: str, trail: str) -> None:
        self.trail = trail
        super().__init__(text)


def preload() -> None:
    """Import what most models need, and nothing that starts a thread: this process is going to be forked."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def run_names(builders: Path, timeout: float) -> list[str]:
    """What the file's ``names()`` returns, asked in a process of its own.

    Raises:
        RuntimeError: if it raises, dies or does not return in time.
    """
    from coverage_models import names_of

    names: list[str] = []
    child = Child(lambda report: report(names=names_of(builders)), timeout)
    while not child.poll(lambda message: names.extend(message.get("names", ()))):
        time.sleep(0.01)
    if child.error:
        raise RuntimeError(f"names() failed: {child.error}\n{child.detail}")
    return names


class Process:
    """The run of one model.

    Attributes:
        row: what is known so far.
    """

    def __init__(self, builders: Path, name: str, ranks: int, timeout: float) -> None:
        from coverage_models import run

        self.row = Row(name)
        self._started = time.monotonic()
        self._child = Child(lambda report: run(builders, name, ranks, report), timeout)

    def poll(self) -> bool:
        """Whether the run has ended; then the row is complete."""

        def update(message: dict[str, Any]) -> None:
            for key, value in message.items():
                setattr(self.row, key, value)

        ended = self._child.poll(update)
        if ended:
            self.row.seconds = time.monotonic() - self._started
            if self._child.error:
                self.row.exact = False
                self.row.error = f"{self._child.error} (during {self.row.stage})"
                self.row.detail = self._child.detail
        return ended

    def kill(self) -> None:
        """End it at once."""
        self._child.kill()


class Child:
    """A forked process in a group of its own that calls a function and says what it reports.

    Attributes:
        error: why it ended, unless it returned.
        detail: traceback of the error, or the last lines it has printed.
    """

    def __init__(self, function: Callable[[Report], None], timeout: float) -> None:
        self.error = ""
        self.detail = ""
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._received = b""
        self._returned = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        reading, writing = os.pipe()
        sys.stdout.flush()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(reading)
            _be_child(function, writing, self._log.fileno(), parent)
        os.close(writing)
        os.set_blocking(reading, False)
        self._reading = reading
        with contextlib.suppress(OSError):  # it has done so itself, or ended
            os.setpgid(self._pid, self._pid)

    def poll(self, listen: Callable[[dict[str, Any]], None]) -> bool:
        """Pass on what has been reported; whether the process has ended."""
        ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None and time.monotonic() > self._deadline:
            self._receive(listen)
            self.kill()
            self._finish(f"did not end within {self._timeout:g} s")
            return True
        self._receive(listen)
        if ended is None:
            return False
        self.kill()
        if self._returned:
            self._finish("")
        elif ended.si_code == os.CLD_EXITED:
            self._finish(f"the process ended with status {ended.si_status}")
        else:
            self._finish(f"the process died of {signal.Signals(ended.si_status).name}")
        return True

    def kill(self) -> None:
        """End the process and all that it has started, at once."""
        # while it is not reaped its number stands for nobody else
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _receive(self, listen: Callable[[dict[str, Any]], None]) -> None:
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self._reading, 1 << 16):
                self._received += more
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            message = json.loads(line)
            self._returned = self._returned or message.pop("returned", False)
            self.error = message.pop("raised", self.error)
            self.detail = message.pop("traceback", self.detail)
            if message:
                listen(message)

    def _finish(self, reason: str) -> None:
        self.error = self.error or reason
        if self.error and not self.detail:
            size = self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, size - TAIL_BYTES))
            self.detail = self._log.read().decode(errors="replace")
        self._log.close()
        os.close(self._reading)


def _be_child(function: Callable[[Report], None], writing: int, log: int, parent: int) -> NoReturn:
    """What the forked process does; it never returns into the code that forked it."""

    def report(**message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(writing, data) :]

    status = 1
    try:
        os.setpgid(0, 0)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        end_with_parent(parent)
        _be_killed_first()
        function(report)
        report(returned=True)
        status = 0
    except BaseException as error:
        with contextlib.suppress(BaseException):
            trail = error.trail if isinstance(error, RankError) else traceback.format_exc()
            report(raised=describe(error), traceback=trail)
    finally:
        os._exit(status)


def describe(error: BaseException) -> str:
    """An exception in one line; what another process has described already stays as it is."""
    if isinstance(error, RankError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _be_killed_first() -> None:
    """When memory runs out, let the kernel take this process, not the one that keeps the table."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
