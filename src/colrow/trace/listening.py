"""Listening to what no mode of PyTorch sees: calls of ``torch.autograd.Function``, and of ``checkpoint``.

A function may have been bound to another name long ago, as ``apply = MyFunction.apply`` is, so replacing it
would miss calls. What it goes on to is replaced instead, for as long as somebody listens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch.utils.checkpoint
from torch.autograd.function import _SingleLevelFunction

Proceed: TypeAlias = Callable[..., Any]
"""Goes on with the call, with the arguments given to it."""

Listener: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any], Proceed], Any]
"""Called with the arguments and what goes on; gives the result."""

_LOCK = threading.Lock()


@dataclass(frozen=True)
class Point:
    """An attribute of PyTorch's that all calls of something go through.

    Attributes:
        owner, name: whose attribute it is, and its name.
        original: calls what is there by itself, given the attribute as it was.
        attribute: makes the attribute from a function that is called in its place.
    """

    owner: Any
    name: str
    original: Callable[[Any], Proceed]
    attribute: Callable[[Proceed], Any]


def _apply(_: Any) -> Proceed:
    def apply(function: type, *arguments: Any, **keywords: Any) -> Any:
        return super(_SingleLevelFunction, function).apply(*arguments, **keywords)  # type: ignore[misc]

    return apply


FUNCTIONS = Point(_SingleLevelFunction, "apply", _apply, classmethod)
"""``apply`` of all autograd functions; the first argument is the function's class."""

CHECKPOINTS = Point(
    torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", lambda it: it, lambda call: call
)
"""``checkpoint(function, ..., use_reentrant=False)``; the first argument is the function, to recompute."""

REENTRANT_CHECKPOINTS = Point(
    torch.utils.checkpoint,
    "CheckpointFunction",
    lambda it: it.apply,
    lambda call: SimpleNamespace(apply=call),
)
"""``checkpoint(function, ..., use_reentrant=True)``; the first argument is the function, for both passes."""


@dataclass(eq=False)
class _Listeners:
    """What stands at a point while anybody listens: the listeners of each thread, the latest last."""

    original: Proceed
    undo: Callable[[], None]
    of_threads: dict[int, list[Listener]] = field(default_factory=dict)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._through(tuple(self.of_threads.get(threading.get_ident(), ())))(*arguments, **keywords)

    def _through(self, listeners: tuple[Listener, ...]) -> Proceed:
        if not listeners:
            return self.original
        further = self._through(listeners[:-1])
        return lambda *arguments, **keywords: listeners[-1](arguments, keywords, further)


class listening:  # a class, since it is entered often
    """``listener`` is called for all calls of this thread that go through ``point`` in this context."""

    __slots__ = ("_listener", "_listeners", "_point", "_thread")

    def __init__(self, point: Point, listener: Listener) -> None:
        self._point, self._listener = point, listener

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        with _LOCK:
            self._listeners = _installed(self._point)
            self._listeners.of_threads.setdefault(self._thread, []).append(self._listener)

    def __exit__(self, *_: object) -> None:
        with _LOCK:
            listeners = self._listeners
            mine = listeners.of_threads[self._thread]
            mine.remove(self._listener)
            if not mine:
                del listeners.of_threads[self._thread]
            if not listeners.of_threads:
                listeners.undo()


def _installed(point: Point) -> _Listeners:
    """The listeners at a point, put there if there are none."""
    present = vars(point.owner).get(point.name)
    for found in (present, getattr(present, "__func__", None), getattr(present, "apply", None)):
        if isinstance(found, _Listeners):
            return found

    def undo() -> None:
        if present is None:
            delattr(point.owner, point.name)  # what its base class has is found again
        else:
            setattr(point.owner, point.name, present)

    listeners = _Listeners(point.original(present), undo)
    setattr(point.owner, point.name, point.attribute(listeners))
    return listeners
