"""Places in the user's program: where a call is made, and where an error was raised."""

from __future__ import annotations

import linecache
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent) + os.sep
COLROW = str(Path(__file__).parent.parent) + os.sep
_DISPATCH = [
    str(Path(_TORCH, name)) for name in ("overrides.py", "_tensor.py", "_jit_internal.py", "_ops.py")
]
_SKIPPED = (str(Path(__file__).parent) + os.sep, *_DISPATCH)
_HANDLER = "__torch_function__"


@dataclass(frozen=True)
class Place:
    """A line of a program.

    Attributes:
        file: its path.
        function: qualified name of the function that the line belongs to.
        line: its number.
    """

    file: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"

    @property
    def text(self) -> str:
        """The line itself, without the blanks around it."""
        return linecache.getline(self.file, self.line).strip()


def caller(function: Any) -> Place:
    """The innermost place outside of colrow that led to a call of the torch function ``function``.

    It may lie in torch, as in ``nn.Linear.forward``, but not in that function's own Python code.
    """
    frame = _outside(function)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(COLROW):
        frame = _outside(function, frame.f_back)
    return _place(frame, frame.f_lineno)


def is_of_colrow(function: Any) -> bool:
    """Whether colrow itself calls the torch function, rather than pass on a call of the model's."""
    frame: FrameType | None = _outside(function)
    is_own = False
    while frame is not None and frame.f_code.co_filename.startswith(COLROW):
        is_handler = frame.f_code.co_name == _HANDLER
        is_own = not is_handler
        frame = _outside(function, frame.f_back) if is_handler else frame.f_back
    return is_own


def user_place() -> Place:
    """The innermost place outside of colrow and torch; the outermost one if there is none."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((COLROW, _TORCH)):
        frame = frame.f_back
    return _place(frame, frame.f_lineno)


def _outside(function: Any, frame: FrameType | None = None) -> FrameType:
    """The frame that calls a torch function: past this module, torch's dispatch and the function itself."""
    frame = frame or sys._getframe(1)
    code, name = getattr(function, "__code__", None), getattr(function, "__name__", "")
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        is_own = frame.f_code is code or (frame.f_code.co_name == name and file.startswith(_TORCH))
        if not is_own and not file.startswith(_SKIPPED):
            break
        frame = frame.f_back
    return frame


def _place(frame: FrameType, line: int) -> Place:
    return Place(frame.f_code.co_filename, frame.f_code.co_qualname, line)


def place_of_error(error: BaseException, model: nn.Module) -> tuple[str, Place | None]:
    """Where an error was raised: the path of the innermost module of ``model`` whose code ran, and the line.

    The line is the innermost outside of colrow and torch, where there is one.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    module, place, inner = "", None, None
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            module = paths[id(owner)]
        inner = _place(frame, trace.tb_lineno)
        if not inner.file.startswith((COLROW, _TORCH)):
            place = inner
        trace = trace.tb_next
    return module, place or inner
