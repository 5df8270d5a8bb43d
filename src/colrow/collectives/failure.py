"""Finding out which rank is at fault when a collective does not complete.

The transport only says that a connection closed or that time ran out, and the rank at its other end may be
as innocent as this one: it left because of a third. So each rank asks who waits in what, and follows that
from rank to rank until it comes to one that raised, died, or waits for nobody.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_group, _get_default_store

from colrow.collectives.notices import (
    Evidence,
    NoticeBoard,
    Verdict,
    Watch,
    is_store_with_launcher,
    wait_until_heard,
)
from colrow.collectives.position import Position, current_position, describe_collective, place_of
from colrow.collectives.statistics import Call
from colrow.errors import RankFailure
from colrow.transport.c10d import leave_destroyed_groups
from colrow.transport.errors import TransportError

GRACE_SECONDS = 3.0
"""How long a failing rank waits for the others' answers before it names those who gave none."""
STORE_SECONDS = 2.0
"""How much longer it waits for the key-value store itself."""
LATE_SECONDS = 1.0
"""A rank that reaches a collective so much later than another is named as late if time ran out."""

T = TypeVar("T")

# one per process group that this process has joined: the thread that answers the other ranks
_watches: WeakKeyDictionary[dist.ProcessGroup, Watch] = WeakKeyDictionary()


def register_member() -> None:
    """Tell the other ranks which process this is, and answer them when one of them fails."""
    group = _get_default_group()
    if group in _watches or dist.get_world_size() == 1:
        return
    for stale in list(_watches.values()):
        stale.stop()
    # a connection of its own, which this rank's other business with the store never blocks
    store = PrefixStore("colrow", _get_default_store()).clone()  # type: ignore[attr-defined]
    board = NoticeBoard(store, dist.get_rank(), dist.get_world_size())
    board.register()
    _watches[group] = Watch(board, group, leave_destroyed_groups)


def diagnose(error: BaseException, call: Call, ranks: Sequence[int]) -> RankFailure:
    """The :class:`RankFailure` for a collective ``call`` among global ``ranks`` that ended in ``error``.

    Takes at most :data:`GRACE_SECONDS` + :data:`STORE_SECONDS`, twice that where rank 0 hosts the store.
    """
    where = describe_collective(call.operation, call.label)
    transport = _first_sentence(error)
    if not dist.is_initialized():
        message = f"{where} did not complete: the process group was destroyed meanwhile ({transport})"
        return RankFailure(message, (), call.label)
    myself = dist.get_rank()
    watch = _watches.get(_get_default_group())
    mine = Position(where, tuple(ranks), time.time())
    if watch is None and isinstance(error, TransportError):  # a job that colrow has not joined
        return RankFailure(f"{where} did not complete on rank {myself}: {error}", error.ranks, call.label)
    try:
        if watch is None:
            raise RuntimeError("this rank never registered")
        board = watch.board
        verdict = _within(GRACE_SECONDS + STORE_SECONDS, lambda: _investigate(board, mine))
        with contextlib.suppress(RuntimeError):
            _within(GRACE_SECONDS + STORE_SECONDS, lambda: _pronounce(board, verdict))
    except RuntimeError as gone:
        verdict = (watch and watch.heard) or _store_is_gone(gone)
    message = f"{where} did not complete on rank {myself}: {verdict.fault} (transport: {transport})"
    return RankFailure(message, verdict.ranks, call.label)


def report_exception(error: BaseException) -> BaseException:
    """Tell the other ranks that ``error`` is about to end this one; the error to show to the user.

    That is ``error`` itself, or a :class:`RankFailure` that names the rank at fault where a collective of
    torch's own (a barrier, a gradient reduction of DDP) only says that a connection closed.
    """
    if not dist.is_initialized() or rank_failure_behind(error) is not None:
        return error
    watch = _watches.get(_get_default_group())
    if watch is None:
        return error
    transport = transport_error_behind(error)
    if transport is not None:
        failure = diagnose(transport, Call(place_of(transport), "", "", 0), range(watch.board.size))
        failure.__cause__ = error
        return failure.with_traceback(error.__traceback__)
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    # the store may be gone; the original error matters more
    with contextlib.suppress(RuntimeError):
        board = watch.board
        _within(STORE_SECONDS, lambda: board.leave_raised(what))
        _within(STORE_SECONDS, board.raise_alarm)
    return error


def rank_failure_behind(error: BaseException) -> RankFailure | None:
    """The :class:`RankFailure` that ``error`` is or was raised because of: then this rank is not at fault."""
    return next((one for one in _chain(error) if isinstance(one, RankFailure)), None)


def transport_error_behind(error: BaseException) -> BaseException | None:
    """What torch raised because another rank was gone, if ``error`` was raised because of that."""
    return next((one for one in _chain(error) if _is_of_transport(one)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, its cause, the cause of that, and so on."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def report_uncaught_exceptions() -> None:
    """From now on an exception that ends this process is named in the other ranks' errors.

    Chains to the ``sys.excepthook`` in force. Installed once per process.
    """
    previous = sys.excepthook
    if getattr(previous, "_colrow", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        shown = report_exception(error)
        previous(type(shown), shown, trace)
        if shown is error and dist.is_initialized() and (watch := _watches.get(_get_default_group())):
            with contextlib.suppress(RuntimeError):
                wait_until_heard(watch.board, watch.board.last_alarm(), GRACE_SECONDS)

    hook._colrow = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def find_fault(myself: int, mine: Position, others: Mapping[int, tuple[Position, Evidence]]) -> Verdict:
    """Who is at fault for a collective that did not complete.

    Args:
        myself: this rank.
        mine: the collective that this rank was in.
        others: every rank that somebody waits for: the collective in which it is missed, and what is
            known about it.
    """
    known = {rank: evidence for rank, (_, evidence) in others.items()}
    raised = [rank for rank in known if known[rank].raised]
    if raised:
        return _name(raised, lambda rank: f"rank {rank} raised {known[rank].raised}")
    died = [rank for rank in known if known[rank].died and not known[rank].left]
    if died:
        return _name(died, lambda rank: f"rank {rank} died ({known[rank].process})")
    missing = [rank for rank in known if not _waits(known[rank])]
    if missing:
        return _name(missing, lambda rank: _describe_missing(rank, mine, *others[rank]))
    positions = {myself: mine} | {rank: evidence.position or mine for rank, evidence in known.items()}
    if len({(position.collective, position.group) for position in positions.values()}) > 1:
        at_odds = [rank for rank in positions if _contradicts(positions[rank], positions.values())]
        waits = (f"rank {rank} in {positions[rank].collective}" for rank in sorted(at_odds or positions))
        return Verdict((), f"the ranks are in different collectives: {'; '.join(waits)}")
    first = min(position.since for position in positions.values())
    late = [rank for rank in positions if positions[rank].since > first + LATE_SECONDS]
    if late:
        return _name(
            late, lambda rank: f"rank {rank} came {positions[rank].since - first:.1f} s after the first"
        )
    return Verdict(
        (), "all its ranks are in it, but their tensors differ in size or dtype, or the network is cut"
    )


def _contradicts(position: Position, others: Iterable[Position]) -> bool:
    """Whether somebody of the same group is in another collective of that group."""
    return any(other.group == position.group and other.collective != position.collective for other in others)


def _investigate(board: NoticeBoard, mine: Position) -> Verdict:
    """Ask who waits for whom until all ranks that matter are accounted for, at most GRACE_SECONDS."""
    now = current_position()
    if now.collective == mine.collective:
        mine = now  # knows since when
    board.leave_failed(mine)
    alarm = board.raise_alarm()
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        others = _follow(board, mine, alarm)
        raised = board.verdict("raised first")
        pending = [rank for rank, (_, evidence) in others.items() if not evidence.is_conclusive]
        if raised or not pending or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return raised or find_fault(board.rank, mine, others)


def _pronounce(board: NoticeBoard, verdict: Verdict) -> None:
    """Leave the verdict for ranks that notice only when the store has gone with this rank."""
    board.leave_verdict(verdict)
    wait_until_heard(board, board.raise_alarm(), GRACE_SECONDS)


def _follow(board: NoticeBoard, mine: Position, alarm: int) -> dict[int, tuple[Position, Evidence]]:
    """Every rank that this one waits for, that those wait for, and so on."""
    others: dict[int, tuple[Position, Evidence]] = {}
    frontier = [mine]
    while frontier:
        waiting = frontier.pop(0)
        for rank in waiting.group:
            if rank != board.rank and rank not in others:
                evidence = board.evidence(rank, alarm)
                others[rank] = waiting, evidence
                if evidence.position is not None and _waits(evidence):
                    frontier.append(evidence.position)
    return others


def _waits(evidence: Evidence) -> bool:
    return evidence.position is not None and bool(evidence.position.collective)


def _name(ranks: Sequence[int], describe: Callable[[int], str]) -> Verdict:
    return Verdict(tuple(sorted(ranks)), "; ".join(describe(rank) for rank in sorted(ranks)))


def _describe_missing(rank: int, mine: Position, waiting: Position, evidence: Evidence) -> str:
    what = "it" if waiting.collective == mine.collective else waiting.collective
    if evidence.left:
        return f"rank {rank} did not reach {what}: it has left the job"
    if evidence.position is not None:
        return f"rank {rank} did not reach {what} in time: it is at {evidence.position.place}"
    state = "stopped, stuck outside Python or cut off"
    return f"rank {rank} did not reach {what} in time and does not answer ({evidence.process}): it is {state}"


def _store_is_gone(error: BaseException) -> Verdict:
    host = "the launcher, which hosts it," if is_store_with_launcher() else "rank 0, which hosts it,"
    fault = (
        f"the job's key-value store is gone ({type(error).__name__}): {host} has died or cannot be reached"
    )
    return Verdict(() if is_store_with_launcher() else (0,), fault)


def _is_of_transport(error: BaseException) -> bool:
    """Whether torch raised this because another rank closed its connection or did not come."""
    if isinstance(error, dist.DistError | TransportError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "gloo/transport" in text or "Connection closed by peer" in text
    )


def _first_sentence(error: BaseException) -> str:
    """What the transport says, without the place in its source and its advice."""
    line = (str(error).splitlines() or [""])[0]
    if line.startswith("["):
        line = line.partition("] ")[2]
    return line.split(". ")[0] or type(error).__name__


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The result of ``function``, which may block in the store for longer than that.

    Raises:
        RuntimeError: if it takes longer, or whatever it raises itself.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="colrow-diagnose", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise RuntimeError("the store does not answer")
    return results[0]
