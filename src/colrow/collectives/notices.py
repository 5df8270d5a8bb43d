"""What the ranks tell each other about failures, through the job's key-value store.

A rank that fails leaves a notice that stands, and raises an alarm. A thread on every rank looks for alarms
and answers with the rank's position; who answers is alive. Nothing here runs per collective.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from colrow.collectives.position import Position, current_position
from colrow.collectives.process import has_died, identify

POLL_SECONDS = 0.5
"""How often a rank looks for an alarm."""
RANKS_PER_SECOND = 1000
"""In large jobs the ranks look less often, so that the store serves no more than so many."""


@dataclass(frozen=True)
class Verdict:
    """Which ranks are at fault, and how: ``ranks`` is empty where none is."""

    ranks: tuple[int, ...]
    fault: str


@dataclass(frozen=True)
class Evidence:
    """What is known about one other rank.

    Attributes:
        raised: its own exception, if that ended it.
        left: it has ended its program or left the process group in good order.
        position: the collective in which it failed, or where it says it is; ``None`` if it does not answer.
        died: its process is known to have ended.
        process: which process it is, in words.
    """

    raised: str = ""
    left: bool = False
    position: Position | None = None
    died: bool = False
    process: str = ""

    @property
    def is_conclusive(self) -> bool:
        return bool(self.raised or self.left or self.died or self.position)


class NoticeBoard:
    """The notices of all ranks of a job.

    Args:
        store: the job's store, or one with a prefix of its own.
        rank: this process's global rank.
        size: number of ranks of the job.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self.rank = rank
        self.size = size

    def register(self) -> None:
        """Tell the other ranks which process this is; withdraw what it left in an earlier process group."""
        for kind in ("failed", "raised", "left", "ended"):
            self._store.delete_key(f"{kind}/{self.rank}")
        self._store.set(f"member/{self.rank}", json.dumps(identify(os.getpid())))

    def leave_failed(self, position: Position) -> None:
        """This rank's collective failed because of another rank. The first notice stands."""
        self._store.compare_set(f"failed/{self.rank}", "", json.dumps(asdict(position)))

    def leave_raised(self, what: str) -> None:
        """This rank ends with an exception of its own."""
        self._store.set(f"raised/{self.rank}", what)
        self.leave_verdict(Verdict((self.rank,), f"rank {self.rank} raised {what}"), "raised first")

    def leave_left(self) -> None:
        """This rank has left the process group in good order."""
        self._store.set(f"left/{self.rank}", "left")

    def leave_verdict(self, verdict: Verdict, key: str = "verdict") -> None:
        """What this rank found out; the first one stands."""
        self._store.compare_set(key, "", json.dumps(asdict(verdict)))

    def verdict(self, *keys: str) -> Verdict | None:
        """The first of these verdicts that somebody has left."""
        for key in keys:
            if self._store.check([key]):
                found = json.loads(self._store.get(key))
                return Verdict(tuple(found["ranks"]), found["fault"])
        return None

    def raise_alarm(self) -> int:
        """Ask all ranks for their position; the number of this alarm."""
        return self._store.add("alarm", 1)

    def last_alarm(self) -> int:
        return self._store.add("alarm", 0)

    def answer(self, alarm: int, position: Position) -> None:
        self._store.set(f"answer/{self.rank}", json.dumps([alarm, asdict(position)]))

    def evidence(self, rank: int, alarm: int) -> Evidence:
        """What is known about ``rank`` since this alarm."""
        member = self._text(f"member/{rank}")
        identity = json.loads(member) if member else {}
        # before its notices are read: one that has ended by now leaves no more of them
        has_ended = bool(identity) and self._has_ended(rank, identity)
        raised, failed = self._text(f"raised/{rank}"), self._text(f"failed/{rank}")
        left, answer = bool(self._text(f"left/{rank}")), self._text(f"answer/{rank}")
        position = _position(json.loads(failed)) if failed else None
        if position is None and answer:
            answered, where = json.loads(answer)
            position = _position(where) if answered >= alarm else None
        return Evidence(
            raised=raised,
            left=left,
            position=position,
            died=not failed and has_ended,
            process=f"process {identity['pid']} on {identity['host']}" if identity else "which never joined",
        )

    def _has_ended(self, rank: int, identity: dict[str, object]) -> bool:
        """Whether its process has ended: as seen from here, or by a rank of its host."""
        if has_died(identity):
            self._store.set(f"ended/{rank}", "ended")
            return True
        return bool(self._text(f"ended/{rank}"))

    def has_heard(self, ranks: Iterable[int], alarm: int) -> bool:
        """Whether each of these ranks has answered, failed or died since this alarm."""
        return all(self.evidence(rank, alarm).is_conclusive for rank in ranks if rank != self.rank)

    def _text(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""


class Watch:
    """Answers alarms from a thread of its own until this process leaves the process group or ends.

    Args:
        board: the notices of all ranks.
        group: until this process group is gone.
        chore: called now and then.

    Attributes:
        board: as given.
        heard: what this rank has last heard about the cause of an alarm, for when the store is gone.
        stop: ends the thread.
    """

    def __init__(self, board: NoticeBoard, group: dist.ProcessGroup, chore: Callable[[], None]) -> None:
        self.board = board
        self._chore = chore
        self.heard: Verdict | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._answer_alarms, name="colrow-watch", daemon=True)
        self._thread.start()
        # also runs when the interpreter ends: a thread inside torch would abort it
        self.stop = weakref.finalize(group, _stop, self._stopped, self._thread, board)

    def _answer_alarms(self) -> None:
        answered = 0
        interval = max(POLL_SECONDS, self.board.size / RANKS_PER_SECOND)
        while not self._stopped.wait(interval):
            self._chore()
            try:
                alarm = self.board.last_alarm()
                if alarm > answered:
                    self.heard = self.board.verdict("raised first", "verdict") or self.heard
                    self.board.answer(alarm, current_position())
                    answered = alarm
            except RuntimeError:  # the store is gone, and with it everybody who could ask
                return


def _stop(stopped: threading.Event, thread: threading.Thread, board: NoticeBoard) -> None:
    stopped.set()
    if thread is not threading.current_thread():
        thread.join(timeout=2.0)
    # where rank 0 hosts the store it may be gone by now, which torch would warn about at every normal end
    if is_store_with_launcher():
        with contextlib.suppress(RuntimeError):
            board.leave_left()


def is_store_with_launcher() -> bool:
    """Whether the launcher hosts the job's store, so that it outlives every rank; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _position(fields: dict[str, object]) -> Position:
    return Position(**{**fields, "group": tuple(fields["group"])})  # type: ignore[arg-type]


def wait_until_heard(board: NoticeBoard, alarm: int, seconds: float) -> None:
    """Where this process hosts the store: give the others time to read why it is about to end."""
    if board.rank != 0 or is_store_with_launcher():
        return
    deadline = time.monotonic() + seconds
    with contextlib.suppress(RuntimeError):
        while not board.has_heard(range(board.size), alarm) and time.monotonic() < deadline:
            time.sleep(0.05)
