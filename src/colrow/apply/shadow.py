"""Giving a module's forward another value of a parameter, while the parameter itself stays as it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from colrow.collectives import Communicator, Enter


class PartialParameters:
    """Enters replicated parameters that a module reads inside a region, so that their gradients are summed.

    Inside a region each rank sees the parameter meet its own part of the data only: its gradient is partial.
    During the module's forward the attribute is shadowed by the entered tensor; ``named_parameters``,
    optimizers and checkpoints see the parameter.
    """

    def __init__(self, communicator: Communicator, module_path: str, names: tuple[str, ...]) -> None:
        self._entries = {name: Enter(communicator, f"parameter {module_path}.{name}") for name in names}

    def attach(self, module: nn.Module) -> None:
        """Hook the module."""
        module.register_forward_pre_hook(self._shadow)
        module.register_forward_hook(self._restore, always_call=True)

    def _shadow(self, module: nn.Module, arguments: Any) -> None:
        for name, enter in self._entries.items():
            # an instance attribute is found before a registered parameter
            module.__dict__[name] = enter(module._parameters[name])  # type: ignore[arg-type]

    def _restore(self, module: nn.Module, arguments: Any, output: Any) -> None:
        for name in self._entries:
            module.__dict__.pop(name, None)
