"""Tied parameters: modules that hold one without reading it."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def holders_of(model: nn.Module, parameters: Collection[str]) -> tuple[str, ...]:
    """Modules that hold a cut parameter under a name of their own, besides the one it is first found at.

    A derived plan has seen every module that reads it; those that do not read it need not know.
    """
    seen: dict[int, str] = {}
    found: dict[str, None] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in parameters and seen.setdefault(id(parameter), name) != name:
            found[name.rpartition(".")[0]] = None
    return tuple(found)
