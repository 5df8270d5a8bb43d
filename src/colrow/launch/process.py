"""One rank's process, as the launcher sees it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import IO

from colrow.launch.report import Exit, Failure, Outcome, Success

STACK_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR2)
"""Makes a rank write the Python stacks of its threads to a file, even if it is stuck outside Python."""
STACK_SECONDS = 0.5
"""How long it may take."""
WORKER = str(Path(__file__).with_name("worker.py"))
TAIL_LINES = 30


@dataclass(frozen=True)
class Task:
    """What a rank is to do: the first message to it.

    Attributes:
        target: ``"package.module:function"``.
        arguments: the pickled keyword arguments.
        path: where to look for modules, as the launcher does.
        stack_file: where to write the stacks on STACK_SIGNAL.
    """

    target: str
    arguments: bytes
    path: tuple[str, ...]
    stack_file: str


class RankProcess:
    """A rank's process in a session of its own, with a connection that ends it when the launcher dies.

    Args:
        rank: the global rank.
        task: what to do.
        environment: all variables of the process.
        folder: where output (of all ranks but 0, which has the terminal) and stacks go.
    """

    def __init__(self, rank: int, task: Task, environment: Mapping[str, str], folder: Path) -> None:
        self.rank = rank
        self.outcome: Outcome | None = None
        self.connection, theirs = Pipe(duplex=True)
        self._log = folder / f"rank{rank}.log"
        self._stacks = Path(task.stack_file)
        command = [sys.executable, "-m", "colrow.launch.worker", str(theirs.fileno()), str(os.getpid())]
        with contextlib.ExitStack() as files:
            output: IO[bytes] | None = None
            if rank > 0:
                output = files.enter_context(self._log.open("wb"))
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL if rank > 0 else None,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        with contextlib.suppress(OSError):  # it has died already, which poll() notices
            self.connection.send_bytes(pickle.dumps(task))

    @property
    def group(self) -> int:
        """The process group of the rank and of what it starts."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def poll(self) -> Outcome | None:
        """How the rank has ended, if it has."""
        if self.outcome is None:
            code = self._process.poll()  # before the report is looked for: it may have come just now
            self._receive()
            if self.outcome is None and code is not None:
                self.outcome = Exit(code)
        return self.outcome

    def _receive(self) -> None:
        try:
            if self.connection.poll():
                report = pickle.loads(self.connection.recv_bytes())
                assert isinstance(report, Success | Failure)
                self.outcome = report
        except (EOFError, OSError):
            pass  # no report: its exit status tells what happened

    def dismiss(self) -> None:
        """Tell a rank that has returned that all others have, too, so that it may end."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(b"end")

    def terminate(self) -> None:
        """Ask the rank to end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End the rank and all processes it has started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, signal.SIGKILL)
        self._process.wait()
        self.connection.close()

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit status; ``None`` if the process runs on after that time."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def ask_for_stacks(self) -> None:
        """Have the running process write where its threads are, for :meth:`stack` to read."""
        # a rank that has not made its file is still starting, and would die of the signal
        if self.is_running and self._stacks.exists():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(STACK_SIGNAL)

    def stack(self) -> str:
        """Where the rank crashed or was when it was asked, innermost line first; empty if not known."""
        text = self._stacks.read_text(errors="replace") if self._stacks.exists() else ""
        parts = [part.strip() for part in text.split("\n\n") if "most recent call first" in part]
        if not parts:
            return ""
        # the thread that crashed, else the oldest one, which is the main one
        chosen = next((part for part in parts if part.startswith("Current thread")), parts[-1])
        own = (WORKER, "<frozen runpy>")
        return "\n".join(line for line in chosen.splitlines()[1:] if not any(one in line for one in own))

    def tail(self) -> str:
        """The last lines of the rank's output; empty for rank 0, whose output is on the terminal."""
        if not self._log.exists():
            return ""
        lines = self._log.read_bytes()[-20000:].decode(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


class Reaper:
    """Ends process groups if this process dies before the context ends; see :mod:`colrow.launch.reaper`."""

    def __enter__(self) -> Reaper:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("reaper.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def watch(self, process: RankProcess) -> None:
        """End this rank's group, too."""
        self._tell(str(process.group))

    def __exit__(self, *error: object) -> None:
        self._tell("done")
        self._process.communicate()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it, which does no harm by itself
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
