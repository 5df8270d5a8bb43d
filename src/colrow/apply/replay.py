"""Activation checkpointing of functions: what a forward changes while it runs, their recomputation does too.

``checkpoint(function, ...)`` within a module's forward runs the function a second time during the backward
pass, when that forward has long ended. So while a forward with changes runs, every function that it hands to
``checkpoint`` is wrapped: the changes hold again whenever it is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from colrow.trace.listening import CHECKPOINTS, REENTRANT_CHECKPOINTS, Proceed, listening

Again: TypeAlias = Callable[[], AbstractContextManager[object]]
"""Makes a context in which what held at some moment of a forward holds again."""


class Replaying:
    """A context in which functions that are checkpointed will be recomputed under what holds then.

    Args:
        now: called when a function is checkpointed.
    """

    __slots__ = ("_now", "_plain", "_reentrant")

    def __init__(self, now: Callable[[], Again]) -> None:
        self._now = now
        self._plain = listening(CHECKPOINTS, self._checkpoint)
        self._reentrant = listening(REENTRANT_CHECKPOINTS, self._checkpoint_reentrant)

    def __enter__(self) -> None:
        self._plain.__enter__()
        self._reentrant.__enter__()

    def __exit__(self, *error: object) -> None:
        self._reentrant.__exit__(*error)
        self._plain.__exit__(*error)

    def _checkpoint(self, given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed) -> Any:
        """What PyTorch is given here it calls to recompute only."""
        return proceed(_Recomputed(given[0], self._now(), passes=0), *given[1:], **keywords)

    def _checkpoint_reentrant(
        self, given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed
    ) -> Any:
        """What PyTorch is given here it calls in the forward first."""
        return proceed(_Recomputed(given[0], self._now(), passes=1), *given[1:], **keywords)


class _Recomputed:
    """A checkpointed function; after so many ``passes`` its calls are recomputations."""

    def __init__(self, function: Callable[..., Any], again: Again, passes: int) -> None:
        self._function, self._again, self._passes = function, again, passes

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self._passes:
            self._passes -= 1
            return self._function(*arguments, **keywords)
        with self._again():
            return self._function(*arguments, **keywords)
