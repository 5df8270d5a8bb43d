"""Parameters that a forward exchanges for others, with ``torch.func.functional_call``, while the model runs.

What is read in place of a parameter has gone through a collective (:mod:`colrow.apply.shadow`). The tensors
that a forward exchanges for a parameter are values of the program: their collectives are where the
program computes them. So they are read as they are. What a caller of the whole model exchanges takes the
parameters' place, collectives included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.utils.stateless
from torch import nn

from colrow.apply.replay import Replaying
from colrow.trace.listening import Point, Proceed, listening

Place: TypeAlias = tuple[nn.Module, str]
"""A module that holds a parameter, and its name there."""

_EXCHANGES = Point(
    torch.nn.utils.stateless, "_reparametrize_module", lambda it: it, lambda exchange: exchange
)
"""What ``functional_call`` goes through: makes a context in which a module has other parameters."""


class Swapped:
    """Knows which of some parameters are exchanged by the model's own forward at the moment.

    Args:
        places: the parameters.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = tuple(places)
        self._now: list[Place] = []
        self._running: list[AbstractContextManager[None]] = []

    def __contains__(self, place: Place) -> bool:
        return place in self._now

    def attach(self, model: nn.Module) -> None:
        """Watch the model's forwards, and what is recomputed of them."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            self._running.append(self._watching())
            self._running[-1].__enter__()

    def _end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._running:
            self._running.pop().__exit__(None, None, None)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with listening(_EXCHANGES, self._exchange), Replaying(lambda: self._watching):
            yield

    def _exchange(self, given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed) -> Any:
        return self._exchanged(proceed(*given, **keywords))

    @contextmanager
    def _exchanged(self, exchange: AbstractContextManager[Any]) -> Iterator[Any]:
        """The exchange, with what was read in place of the parameters out of its way."""
        before = [holder._parameters.get(name) for holder, name in self._places]
        with exchange as result:
            found = [
                (holder, name)
                for (holder, name), parameter in zip(self._places, before, strict=True)
                if holder._parameters.get(name) is not parameter
            ]
            hidden = [holder.__dict__.pop(name, None) for holder, name in found]
            now = self._now
            self._now = [*now, *found]
            try:
                yield result
            finally:
                self._now = now
                for (holder, name), value in zip(found, hidden, strict=True):
                    if value is not None:
                        holder.__dict__[name] = value
