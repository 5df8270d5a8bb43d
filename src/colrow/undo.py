"""Taking back what was done to a model's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from colrow.forwards import kept_by_forwards, take_back

_MISSING = object()
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class Undo:
    """What changed in the modules of a model between two moments, and how it was before.

    Everything is kept by the path of the module, so that a copy of the model can be put back as well.

    Args:
        model: as it is before it is changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._classes: dict[str, type[nn.Module]] = {}
        self._attributes: dict[str, dict[str, Any]] = {}
        self._hooks: dict[str, dict[str, set[int]]] = {}
        for path, module in model.named_modules():
            self._classes[path] = type(module)
            self._attributes[path] = dict(vars(module))
            self._hooks[path] = {name: set(vars(module)[name]) for name in _HOOKS}

    def added_hooks(self, model: nn.Module) -> Callable[[str], int]:
        """How many forward hooks the module of a path has got until now."""
        before = {path: len(hooks["_forward_hooks"]) for path, hooks in self._hooks.items()}
        return lambda path: len(vars(model.get_submodule(path))["_forward_hooks"]) - before[path]

    def seal(self, model: nn.Module) -> None:
        """The model has been changed: from now on only these changes are known."""
        for path, module in model.named_modules():
            before = self._attributes[path]
            now = vars(module)
            changed = {
                name
                for name in before.keys() | now.keys()
                if before.get(name, _MISSING) is not now.get(name, _MISSING)
            } - kept_by_forwards(module)
            self._attributes[path] = {name: before.get(name, _MISSING) for name in changed}
            self._hooks[path] = {name: set(now[name]) - self._hooks[path][name] for name in _HOOKS}

    def run(self, model: nn.Module) -> None:
        """Put the model, or a copy of it, back as it was; what others have changed since stays."""
        for path, module in model.named_modules():
            if path not in self._classes:
                continue
            module.__class__ = self._classes[path]
            take_back(module)
            for name, value in self._attributes[path].items():
                if value is _MISSING:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = value
            for name, added in self._hooks[path].items():
                for key in added:
                    vars(module)[name].pop(key, None)
