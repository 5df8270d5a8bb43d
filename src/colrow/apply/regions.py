"""The regions of a plan: which layers enter one, which leave it, and the module that holds them all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from colrow.apply.kept_parts import KeptParts
from colrow.layers import SharedEntry
from colrow.plan import Entry, Plan
from colrow.randomness import RegionRandomness


@dataclass(frozen=True)
class Region:
    """Operators between the layers that cut features along one axis and those that sum over them.

    Attributes:
        name: the first of the layers that enter it.
        columns: those layers.
        entry: the entry that they belong to.
        exits: the row-parallel layers that leave it.
        scope: path of the innermost module that holds them and has a forward of its own.
    """

    name: str
    columns: tuple[str, ...]
    entry: Entry
    exits: tuple[str, ...]
    scope: str


def find_regions(plan: Plan, model: nn.Module) -> list[Region]:
    """Pair each exit with the nearest layers of its axis: those with which it shares most of its path."""

    def axis(path: str) -> str:
        return plan.parameters[f"{path}.weight"].axis

    exits: dict[tuple[Entry, tuple[str, ...]], list[str]] = {}
    for exit in plan.exits:
        candidates = []
        for entry in plan.entries:
            columns = tuple(path for path in entry.modules if axis(path) == axis(exit.module))
            if columns:
                candidates.append((entry, columns))
        if candidates:
            nearest = max(candidates, key=lambda one: len(_holders([exit.module, *one[1]])))
            exits.setdefault(nearest, []).append(exit.module)
    regions = []
    for (entry, columns), modules in exits.items():
        scope = _holders([*columns, *modules])
        while scope and isinstance(
            model.get_submodule(".".join(scope)), nn.ModuleList | nn.ModuleDict
        ):  # containers are not called
            scope = scope[:-1]
        regions.append(Region(columns[0], columns, entry, tuple(modules), ".".join(scope)))
    return regions


class Scope:
    """Hooks on the module that holds a region: outside of it random numbers are alike and nothing is held."""

    def __init__(self, region: str, randomness: RegionRandomness, entry: SharedEntry | None) -> None:
        self._region, self._randomness, self._entry = region, randomness, entry

    def attach(self, module: nn.Module) -> None:
        """Hook the module."""
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, arguments: Any) -> None:
        # dropout may be active in a part of a model that is otherwise in evaluation
        is_training = module.training or any(child.training for child in module.modules())
        self._randomness.begin_scope(self._region, is_training)

    def _end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._randomness.end_scope()
        if self._entry is not None:
            self._entry.forget()


class Forgetting:
    """A forward hook that lets go of what entries have remembered; copied with the model."""

    def __init__(self, *entries: SharedEntry | KeptParts) -> None:
        self._entries = entries

    def __call__(self, *_: object) -> None:
        if not torch.compiler.is_dynamo_compiling():
            for entry in self._entries:
                entry.forget()


def common_module(paths: Iterable[str]) -> str:
    """The path of the innermost module that holds all of those at ``paths``, or is one of them."""
    return ".".join(_common(path.split(".") if path else [] for path in paths))


def _holders(paths: Iterable[str]) -> list[str]:
    """The names of the innermost module that holds all of those at ``paths``."""
    return _common(path.split(".")[:-1] for path in paths)


def _common(paths: Iterable[list[str]]) -> list[str]:
    """The names that all paths begin with."""
    common = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return [names[0] for names in common]
