"""Giving a module's forward another value of a parameter, while the parameter itself stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from colrow.apply.replay import Again, Replaying
from colrow.apply.values import Change


class Shadow:
    """Passes parameters through collectives while a module reads them.

    Inside a region each rank sees a parameter meet its own part of the data only: its gradient is partial, so
    the parameter has to be entered. A parameter that is added to a partial sum is added by one rank. During
    the module's forward the parameter's attribute is shadowed by the result; ``named_parameters``, optimizers
    and checkpoints see the parameter.

    Args:
        parameters: of each parameter the module that holds it, its name there and what it passes through.
    """

    def __init__(self, parameters: Sequence[tuple[nn.Module, str, Change]]) -> None:
        self._parameters = tuple(parameters)
        self._before: list[tuple[list[Any], Replaying | None]] = []

    def attach(self, reader: nn.Module) -> None:
        """Hook the module that reads them."""
        reader.register_forward_pre_hook(self._shadow)
        reader.register_forward_hook(self._restore, always_call=True)

    def _shadow(self, module: nn.Module, arguments: Any) -> None:
        before = self._put([change(holder._parameters[name]) for holder, name, change in self._parameters])  # type: ignore[arg-type]
        replaying = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            replaying = Replaying(self._now)
            replaying.__enter__()
        self._before.append((before, replaying))

    def _restore(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not self._before:
            return  # what came before this hook raised
        before, replaying = self._before.pop()
        if replaying is not None:
            replaying.__exit__()
        self._put(before)

    def _put(self, values: list[Any]) -> list[Any]:
        """Shadow the parameters by other values, or by nothing where these are ``None``; what was there."""
        before = []
        for (holder, name, _), value in zip(self._parameters, values, strict=True):
            # an instance attribute is found before a registered parameter
            before.append(holder.__dict__.get(name))
            if value is None:
                holder.__dict__.pop(name, None)
            else:
                holder.__dict__[name] = value
        return before

    def _now(self) -> Again:
        """What shadows the parameters now, for the recomputation of what is checkpointed."""
        values = [holder.__dict__.get(name) for holder, name, _ in self._parameters]
        return partial(self._shadowed, values)

    @contextmanager
    def _shadowed(self, values: list[Any]) -> Iterator[None]:
        before = self._put(values)
        try:
            with Replaying(self._now):
                yield
        finally:
            self._put(before)
