"""Letting a module's code read what a collective makes of a parameter, which itself stays what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from colrow.apply.replay import Again, Replaying
from colrow.apply.swapped import Place, Swapped
from colrow.apply.values import Change

Holders: TypeAlias = tuple[Place, ...]
"""Modules that hold a parameter, with its name in each."""


class Shadow:
    """Collectives on parameters: what a module's code reads has gone through them.

    Two kinds of parameters that every rank holds need one. Inside a region each rank applies the parameter to
    its own part of the data, so that its gradient is partial: it is entered, and the gradient summed. And a
    parameter that is added to a partial sum must be added by one rank only.

    The collective's result is put into the ``__dict__`` of the module that holds the parameter while the
    reading module's forward runs. Code that reads the attribute finds it there before it finds the parameter;
    ``named_parameters``, optimizers and checkpoints still find the parameter.

    Args:
        parameters: the modules that hold each parameter, with its name there, and the collective. Tied
            parameters have several.
        swapped: the parameters that the model's forward exchanges for values of its own.
    """

    def __init__(self, parameters: Sequence[tuple[Holders, Change]], swapped: Swapped) -> None:
        self._changes, self._swapped = tuple(parameters), swapped
        self._places = [place for holders, _ in self._changes for place in holders]
        self._before: list[tuple[list[Any], Replaying | None]] = []

    def attach(self, reader: nn.Module) -> None:
        """Hook the module whose code reads them."""
        reader.register_forward_pre_hook(self._shadow)
        reader.register_forward_hook(self._restore, always_call=True)

    def _shadow(self, module: nn.Module, arguments: Any) -> None:
        values: list[Any] = []
        for holders, change in self._changes:
            present = [place for place in holders if place not in self._swapped]
            result = None
            if present:
                holder, name = present[0]
                parameter = holder._parameters.get(name)
                if parameter is None:  # of another pipeline stage, where nothing reads it
                    values += [holder.__dict__.get(name) for holder, name in holders]
                    continue
                result = change(parameter)
            values += [result if place in present else None for place in holders]
        before = self._put(values)
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
        """Put values before the parameters, or nothing where one is ``None``; gives what was there before."""
        before = []
        for (holder, name), value in zip(self._places, values, strict=True):
            # an instance attribute is found before a registered parameter
            before.append(holder.__dict__.get(name))
            if value is None:
                holder.__dict__.pop(name, None)
            else:
                holder.__dict__[name] = value
        return before

    def _now(self) -> Again:
        """Makes the context in which the code reads what it reads now: for what is recomputed later."""
        values = [holder.__dict__.get(name) for holder, name in self._places]
        return partial(self._shadowed, values)

    @contextmanager
    def _shadowed(self, values: list[Any]) -> Iterator[None]:
        before = self._put(values)
        try:
            with Replaying(self._now):
                yield
        finally:
            self._put(before)
