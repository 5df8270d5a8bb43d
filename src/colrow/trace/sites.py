"""Places in the user's program, from the frames of the running call."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from colrow.trace.records import CallSite

_TORCH = str(Path(torch.__file__).parent) + os.sep
_PACKAGE = Path(__file__).parent.parent
# code that watches or changes calls, and is not where they come from
_HERE = tuple(str(_PACKAGE / folder) + os.sep for folder in ("trace", "apply", "verify", "parallel"))
_MACHINERY = (
    str(Path(_TORCH, "overrides.py")),
    str(Path(_TORCH, "_jit_internal.py")),
    str(Path(_TORCH, "_ops.py")),
    str(Path(_TORCH, "_tensor.py")),
)


# Python 3.11 calls in two instructions, and which of the two is current depends on how warm the code is
_PRECALL = dis.opmap.get("PRECALL")
_FROM_PRECALL_TO_CALL = 4


def _site(frame: FrameType | None) -> CallSite:
    assert frame is not None
    instruction = frame.f_lasti
    if _PRECALL is not None and frame.f_code.co_code[instruction] == _PRECALL:
        instruction += _FROM_PRECALL_TO_CALL
    return CallSite(frame.f_code, instruction)


def call_site(function: Callable[..., Any]) -> CallSite:
    """The place that calls a torch function: the innermost frame that is not that function's own Python code.

    It may lie in torch, as in ``nn.Linear.forward``.
    """
    code = getattr(function, "__code__", None)
    name = getattr(function, "__name__", "")
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        own = frame.f_code is code or (frame.f_code.co_name == name and file.startswith(_TORCH))
        if not own and not file.startswith(_HERE) and file not in _MACHINERY:
            break
        frame = frame.f_back
    return _site(frame)


def user_site() -> CallSite:
    """The innermost place outside torch and the recorder; the outermost place if there is none."""
    frame: FrameType | None = sys._getframe(1)
    last = frame
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, *_HERE)):
            return _site(frame)
        last = frame
        frame = frame.f_back
    return _site(last)
