"""Where this process's program is, for the other ranks' errors.

Read from the Python stacks when somebody asks, so that it costs nothing while all goes well.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch

from colrow.collectives.statistics import Call

T = TypeVar("T")

_COLROW = f"{Path(__file__).parents[1]}{os.sep}"
_COLLECTIVES = tuple(f"{_COLROW}{folder}{os.sep}" for folder in ("collectives", "transport"))
_LIBRARIES = (
    *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    str(Path(torch.__file__).parent),
    "<frozen",
)


@dataclass(frozen=True)
class Position:
    """Where a rank's program is.

    Attributes:
        collective: the collective that it waits in, such as ``"all_reduce 'exit model.mlp'"``; empty if none.
        group: global ranks of that collective.
        since: seconds since the epoch when it began to wait.
        place: innermost line of the user's own code, such as ``"train.py:50 in step"``.
    """

    collective: str = ""
    group: tuple[int, ...] = ()
    since: float = 0.0
    place: str = ""


def current_position() -> Position:
    """What this process's other threads do: wait in a collective, or else the line of the main thread."""
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    for frame in frames.values():
        waiting = _collective_of(frame)
        if waiting is not None:
            return waiting
    main = frames.get(threading.main_thread().ident or 0)
    return Position(place=_place(main) if main is not None else "")


def compute_meanwhile(function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """Call a function that computes, within something that waits otherwise, such as a pipeline's step."""
    return function(*arguments, **keywords)


def describe_collective(operation: str, label: str) -> str:
    """How errors name a collective."""
    return f"{operation} {label!r}" if label else operation


def _collective_of(innermost: FrameType) -> Position | None:
    """The collective of colrow's that a thread waits in, if any: the ``wait`` of a :class:`Pending`."""
    for frame, _ in traceback.walk_stack(innermost):
        if frame.f_code is compute_meanwhile.__code__:
            return None
        pending = frame.f_locals.get("self") if frame.f_code.co_name == "wait" else None
        call = getattr(pending, "_call", None)
        if isinstance(call, Call):
            waited = time.perf_counter() - frame.f_locals.get("begin", time.perf_counter())
            return Position(
                describe_collective(call.operation, call.label),
                tuple(getattr(pending, "_ranks", ())),
                time.time() - waited,
                _place(innermost),
            )
    return None


def place_of(error: BaseException) -> str:
    """The user's line that raised ``error``, and the function of torch.distributed that it had called."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return _describe(frames[::-1])


def own_place() -> str:
    """The user's line that the calling thread is at, and the function of torch.distributed that it called."""
    return _place(sys._getframe(1))


def _place(innermost: FrameType) -> str:
    return _describe(list(traceback.walk_stack(innermost)))


def _describe(frames: Sequence[tuple[FrameType, int]]) -> str:
    """Of frames with their lines, innermost first: the first outside of libraries."""
    waits_in = ""
    for frame, line in frames:
        name = frame.f_code.co_name
        if not waits_in and frame.f_globals.get("__name__") == "torch.distributed.distributed_c10d":
            waits_in = f"torch.distributed.{name}, called at "
        if _is_users(frame.f_code):
            return f"{waits_in}{_shorten(frame.f_code.co_filename)}:{line} in {name}"
    return f"{frames[0][0].f_code.co_filename}:{frames[0][1]}" if frames else "an unknown place"


def _is_users(code: CodeType) -> bool:
    path = code.co_filename
    if path.startswith(_COLROW):
        return not path.startswith(_COLLECTIVES)
    return not path.startswith(_LIBRARIES)


def _shorten(path: str) -> str:
    try:
        inside = os.path.relpath(path)
    except (ValueError, OSError):
        return path
    return path if inside.startswith("..") else inside
