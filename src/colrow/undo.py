"""Taking back what was done to a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MISSING = object()


class Undo:
    """What has to be done, in reverse order, to have everything as it was."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        """Remember one step."""
        self._steps.append(step)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an object itself, and remember what it was."""
        before = vars(owner).get(name, _MISSING)

        def restore() -> None:
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        setattr(owner, name, value)
        self.add(restore)

    def keep(self, owner: Any) -> None:
        """Remember the class and all plain attributes of a module, whatever is going to happen to them."""
        before_class = owner.__class__
        before = dict(vars(owner))

        def restore() -> None:
            owner.__class__ = before_class
            for name in set(vars(owner)) - set(before):
                del vars(owner)[name]
            vars(owner).update(before)

        self.add(restore)

    def run(self) -> None:
        """Take everything back, last first."""
        while self._steps:
            self._steps.pop()()
