"""Giving a module's forward another value of a parameter, while the parameter itself stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

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
        self._before: list[list[Any]] = []

    def attach(self, reader: nn.Module) -> None:
        """Hook the module that reads them."""
        reader.register_forward_pre_hook(self._shadow)
        reader.register_forward_hook(self._restore, always_call=True)

    def _shadow(self, module: nn.Module, arguments: Any) -> None:
        before = []
        for holder, name, change in self._parameters:
            # an instance attribute is found before a registered parameter
            before.append(holder.__dict__.get(name))
            holder.__dict__[name] = change(holder._parameters[name])  # type: ignore[arg-type]
        self._before.append(before)

    def _restore(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not self._before:
            return  # what came before this hook raised
        for (holder, name, _), before in zip(self._parameters, self._before.pop(), strict=True):
            if before is None:
                holder.__dict__.pop(name, None)
            else:
                holder.__dict__[name] = before  # a reader around this one
