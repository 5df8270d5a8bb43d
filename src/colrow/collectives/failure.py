"""Finding out which rank is at fault when a collective does not complete.

The transport only says that a connection closed or that time ran out. Each rank therefore leaves a note in
the job's key-value store when it fails, and reads the notes of the others: who left none has died (its
process is gone) or has never reached the collective.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from colrow.collectives.statistics import Call
from colrow.errors import RankFailure

GRACE_SECONDS = 3.0
"""How long a failing rank waits for the others' notes before it names those who left none."""


@dataclass(frozen=True)
class Note:
    """What a failing rank leaves for the others: the collective it was in, or what it raised."""

    waiting_in: str = ""
    raised: str = ""


def _store() -> Store:
    return PrefixStore("colrow", _get_default_store())


def register_member() -> None:
    """Tell the other ranks which process this is, so that they can see whether it still lives."""
    member = {"host": socket.gethostname(), "pid": os.getpid()}
    _store().set(f"member/{dist.get_rank()}", json.dumps(member))


def leave_note(note: Note) -> None:
    """Leave the reason of this rank's failure for the others. The first note stands."""
    key = f"note/{dist.get_rank()}"
    store = _store()
    if not store.check([key]):
        store.set(key, json.dumps(note.__dict__))


def report_uncaught_exceptions() -> None:
    """From now on an exception that ends this process is named in the other ranks' errors.

    Chains to the ``sys.excepthook`` in force. Installed once per process.
    """
    previous = sys.excepthook
    if getattr(previous, "_colrow", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if dist.is_initialized() and not isinstance(error, RankFailure):
            # the store may be gone; the original error matters more
            with contextlib.suppress(Exception):
                leave_note(Note(raised=f"{kind.__name__}: {error}"))
        previous(kind, error, trace)

    hook._colrow = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _has_died(member: dict[str, object]) -> bool:
    """Whether a process of this host has ended (a zombie has, too)."""
    if member["host"] != socket.gethostname():
        return False
    status = Path(f"/proc/{member['pid']}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return Path("/proc/self").exists()
    except OSError:
        return False


def _read_notes(store: Store, ranks: Sequence[int]) -> dict[int, Note]:
    found = {}
    for rank in ranks:
        if store.check([f"note/{rank}"]):
            found[rank] = Note(**json.loads(store.get(f"note/{rank}")))
    return found


def _members(store: Store, ranks: Sequence[int]) -> dict[int, dict[str, object]]:
    return {
        rank: json.loads(store.get(f"member/{rank}")) for rank in ranks if store.check([f"member/{rank}"])
    }


def _names(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def diagnose(error: BaseException, call: Call, ranks: Sequence[int]) -> RankFailure:
    """The :class:`RankFailure` for a collective ``call`` among global ``ranks`` that ended in ``error``.

    Waits at most :data:`GRACE_SECONDS` for the other ranks' notes.
    """
    where = f"{call.operation} {call.label!r}"
    myself = dist.get_rank()
    others = [rank for rank in ranks if rank != myself]
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        store = _store()
        leave_note(Note(waiting_in=where))
        members = _members(store, others)
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            notes = _read_notes(store, others)
            silent = [rank for rank in others if rank not in notes]
            died = [rank for rank in silent if rank in members and _has_died(members[rank])]
            raised = [rank for rank in notes if notes[rank].raised]
            if raised or len(died) == len(silent) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    except Exception as gone:
        return RankFailure(
            f"{where} did not complete on rank {myself} and the job's key-value store is gone "
            f"({type(gone).__name__}): the process that hosts it, rank 0 or the launcher, has died "
            f"(transport: {cause})",
            (),
            call.label,
        )
    if raised:
        who, fault = raised, "; ".join(f"rank {rank} raised {notes[rank].raised}" for rank in raised)
    elif died:
        pids = ", ".join(str(members[rank]["pid"]) for rank in died)
        who, fault = died, f"{_names(died)} died (process {pids})"
    elif silent:
        who, fault = silent, f"{_names(silent)} did not reach it in time (still computing, stuck or cut off)"
    else:
        who = []
        fault = "the ranks are in different collectives: " + "; ".join(
            [f"rank {myself} in {where}"] + [f"rank {rank} in {notes[rank].waiting_in}" for rank in others]
        )
    message = f"{where} did not complete on rank {myself}: {fault} (transport: {cause})"
    return RankFailure(message, tuple(who), call.label)
