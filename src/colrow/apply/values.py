"""Changing tensors where they stand: among the arguments of a module, in its result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from colrow.errors import PlanError
from colrow.forwards import OwnForward
from colrow.plan.places import Path

Change: TypeAlias = Callable[[Tensor], Tensor]


class ModuleChanges:
    """What is to happen to the inputs and outputs of one module."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self._inputs: list[tuple[int | None, str | None, Path, Change]] = []
        self._outputs: list[tuple[Path, Change]] = []
        self._known: dict[tuple[int | None, str | None, Path, type], Path] = {}

    def is_first(self, path: Path, kind: type) -> bool:
        """Whether no other path to the same argument has been given for a change of this kind."""
        place = (*self._argument(path[0]), path[1:], kind)
        return self._known.setdefault(place, path) == path

    def change_input(self, path: Path, change: Change) -> None:
        """Change the tensor at ``path`` of the arguments."""
        position, name = self._argument(path[0])
        self._inputs.append((position, name, path[1:], change))

    def change_output(self, path: Path, change: Change) -> None:
        """Change the tensor at ``path`` of the result."""
        self._outputs.append((path, change))

    def _argument(self, first: int | str) -> tuple[int | None, str | None]:
        """Position and name of an argument, as far as it has them: callers may use either."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(self.module.forward).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind in kinds]
        if isinstance(first, int):
            return first, names[first] if first < len(names) else None
        return (names.index(first) if first in names else None), first

    def attach(self) -> None:
        """Give the module a forward of its own."""
        _Forward(self.module, self.path, tuple(self._inputs), tuple(self._outputs)).attach()


class _Forward(OwnForward):
    """A module's forward with its inputs and outputs changed."""

    def __init__(
        self,
        module: nn.Module,
        path: str,
        inputs: tuple[tuple[int | None, str | None, Path, Change], ...],
        outputs: tuple[tuple[Path, Change], ...],
    ) -> None:
        super().__init__(module)
        self._path, self._inputs, self._outputs = path, inputs, outputs
        # of most modules it is one tensor, given by position, that is changed: there is nothing to look for
        is_plain = [(position, rest) for position, _, rest, _ in inputs] in ([], [(0, ())])
        self._first = tuple(change for *_, change in inputs) if is_plain else None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self._first is not None and len(arguments) == 1 and isinstance(arguments[0], Tensor):
            (item,) = arguments
            for change in self._first:
                item = change(item)
            return self._leave(self._inner((item,), keywords))
        lent: list[_Lent] = []
        for position, name, rest, change in self._inputs:
            if name is not None and name in keywords:
                item = keywords[name]
                keywords[name] = (
                    change(item)
                    if not rest and isinstance(item, Tensor)
                    else changed(item, rest, change, lent)
                )
            elif position is not None and position < len(arguments):
                item = arguments[position]
                new = (
                    change(item)
                    if not rest and isinstance(item, Tensor)
                    else changed(item, rest, change, lent)
                )
                if new is not item:
                    arguments = (*arguments[:position], new, *arguments[position + 1 :])
            elif name is None:
                # an argument with a name may be left out; one of *arguments may have come by name
                raise self._missing(position)
        try:
            output = self._inner(arguments, keywords)
        finally:
            for one in lent:
                one.put_back()
        return self._leave(output)

    def _leave(self, output: Any) -> Any:
        for path, change in self._outputs:
            output = (
                change(output) if not path and isinstance(output, Tensor) else changed(output, path, change)
            )
        return output

    def _missing(self, which: int | None) -> ValueError:
        return ValueError(
            f"{self._path or 'the model'} is called without argument {which}, which the plan changes: call "
            "it as in the example that the plan was made from, or make the plan from one of this form"
        )

    def release(self) -> None:
        self._inputs = self._outputs = ()
        self._first = ()


@dataclass(frozen=True)
class _Lent:
    """A place in a container of the caller, as it was before a module ran and while it ran."""

    container: Any
    key: Any
    before: Any
    after: Any

    def put_back(self) -> None:
        """What was there before, unless the module has put something else there."""
        if _get(self.container, self.key) is self.after:
            _set(self.container, self.key, self.before)


def _get(container: Any, key: Any) -> Any:
    if isinstance(container, list | Mapping):
        return container[key] if isinstance(container, list) else container.get(key)
    return getattr(container, str(key))


def _set(container: Any, key: Any, item: Any) -> None:
    if isinstance(container, list | MutableMapping):
        container[key] = item
    else:
        object.__setattr__(container, str(key), item)


def changed(item: Any, path: Path, change: Change, lent: list[_Lent] | None = None) -> Any:
    """A nesting with the tensor at ``path`` changed; where there is none, for this call, nothing is.

    What can change is changed in place (mappings, outputs of transformers), so that its type stays.

    Args:
        lent: for what belongs to the caller, notes what was changed in place, to be put back: it is the
            caller's own container that a module gets, as it may be there to be written into.
    """
    if item is None:
        return None
    if not path:
        if isinstance(item, Tensor):
            return change(item)
        raise _other_form(item, path)
    first, rest = path[0], path[1:]
    if isinstance(item, tuple | list) and isinstance(first, int):
        if first >= len(item):
            return item
        new = changed(item[first], rest, change, lent)
        if isinstance(item, list) and lent is not None:
            return _with(item, first, new, lent)
        items = [*item[:first], new, *item[first + 1 :]]
        if isinstance(item, list):
            return items
        return type(item)(*items) if hasattr(item, "_fields") else tuple(items)
    if isinstance(item, MutableMapping):
        if first in item:
            return _with(item, first, changed(item[first], rest, change, lent), lent)
        if isinstance(first, int):
            raise _other_form(item, path)
        return item
    if isinstance(item, Mapping) and not isinstance(first, int):
        return {
            key: changed(each, rest, change, lent) if key == first else each for key, each in item.items()
        }
    if hasattr(item, str(first)) and not isinstance(item, tuple | list | Mapping | Tensor | nn.Module):
        return _with(item, first, changed(getattr(item, str(first)), rest, change, lent), lent)
    raise _other_form(item, path)


def _with(container: Any, key: Any, item: Any, lent: list[_Lent] | None) -> Any:
    before = _get(container, key)
    if item is not before:
        _set(container, key, item)
        if lent is not None:
            lent.append(_Lent(container, key, before, item))
    return container


def _other_form(item: Any, path: Path) -> ValueError:
    where = ".".join(map(str, path)) or "a tensor"
    return ValueError(
        f"the plan changes {where} of what is a {type(item).__name__} here, and was something else in the "
        "example that the plan was made from: make the plan from an example of this form"
    )


class ModuleTable:
    """The changes of all modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changes: dict[str, ModuleChanges] = {}

    def at(self, path: str) -> ModuleChanges:
        """The changes of the module at ``path``.

        Raises:
            PlanError: if there is none.
        """
        if path not in self._changes:
            try:
                module = self._model.get_submodule(path)
            except AttributeError as error:
                raise PlanError(path, "the model has no such module", "Make a new plan for it.") from error
            self._changes[path] = ModuleChanges(path, module)
        return self._changes[path]

    def attach(self) -> None:
        """Change all modules."""
        for changes in self._changes.values():
            changes.attach()
