"""A model's integers replaced by traced ones while it is recorded, and the model put back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from colrow.trace.integers import Attribute, EscapeListener, TracedInt
from colrow.trace.tree import is_object

_DEPTH = 4
"""How far below a module configuration objects are followed: ``config.text_config.vision.heads``."""


@contextmanager
def traced_attributes(model: nn.Module, listener: EscapeListener) -> Iterator[None]:
    """Integers held by modules, and by configuration objects, tuples, lists and dictionaries of theirs, know
    their names in this context.

    At its end every such container is as it was at its beginning, whatever the forward did to it: attributes
    added or changed, buffers and hooks registered, training flags.

    Integers of magnitude 0 and 1 stay plain: nothing of size one can be cut.
    """
    undo: list[Callable[[], None]] = []
    try:
        entered: set[int] = set()
        for path, module in model.named_modules():
            for item in vars(module).values():
                # parameters, buffers, modules and hooks among them
                if isinstance(item, dict):
                    _keep_mapping(item, undo)
            _trace_mapping(vars(module), path, "", listener, undo, entered, 0)
        yield
    finally:
        for action in reversed(undo):
            action()


def _keep_mapping(mapping: MutableMapping[Any, Any], undo: list[Callable[[], None]]) -> None:
    kept = dict(mapping)

    def restore() -> None:
        if list(mapping) != list(kept) or any(mapping[key] is not kept[key] for key in kept):
            mapping.clear()
            mapping.update(kept)

    undo.append(restore)


def _trace_mapping(
    mapping: MutableMapping[Any, Any],
    module: str,
    prefix: str,
    listener: EscapeListener,
    undo: list[Callable[[], None]],
    entered: set[int],
    depth: int,
) -> None:
    """Replace the integers in a mapping; the first module that holds a shared object names it."""
    if id(mapping) in entered or depth > _DEPTH:
        return
    entered.add(id(mapping))
    _keep_mapping(mapping, undo)

    def traced(name: str, item: Any) -> Any:
        if type(item) is int and abs(item) > 1:
            return TracedInt(item, Attribute(module, name, item), listener)
        if type(item) is tuple and len(item) < 100:
            return tuple(traced(f"{name}.{index}", each) for index, each in enumerate(item))
        if type(item) is list and len(item) < 100 and id(item) not in entered:
            entered.add(id(item))
            kept = list(item)
            undo.append(lambda: item.__setitem__(slice(None), kept))
            item[:] = [traced(f"{name}.{index}", each) for index, each in enumerate(item)]
        elif type(item) is dict and all(isinstance(key, str) for key in item):
            _trace_mapping(item, module, f"{name}.", listener, undo, entered, depth + 1)
        elif is_object(item) and not callable(item) and not type(item).__module__.startswith("torch."):
            _trace_mapping(vars(item), module, f"{name}.", listener, undo, entered, depth + 1)
        return item

    for name, item in list(mapping.items()):
        if isinstance(item, Tensor) or name in ("_parameters", "_buffers", "_modules"):
            continue
        replacement = traced(f"{prefix}{name}", item)
        if replacement is not item:
            mapping[name] = replacement
