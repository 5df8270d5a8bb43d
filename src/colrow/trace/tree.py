"""Tensors inside nested arguments and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Path: TypeAlias = tuple[int | str, ...]


def tensors_of(item: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dictionaries, in order; one that stands twice is given twice."""
    found: list[Tensor] = []

    def collect(item: Any) -> None:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple | list):
            for each in item:
                collect(each)
        elif isinstance(item, dict):
            for each in item.values():
                collect(each)

    collect(item)
    return found


def tensors_by_path(
    item: Any, *, inside_objects: bool = False, inside_result: bool = False
) -> list[tuple[Path, Tensor]]:
    """The tensors in tuples, lists, mappings, dataclasses and simple namespaces with their paths.

    Args:
        inside_objects: also look at the attributes of other objects, such as a key-value cache.
        inside_result: of ``item`` itself, if it is such an object, as the result of a model may be.
    """
    found: list[tuple[Path, Tensor]] = []
    entered: set[int] = set()

    def collect(path: Path, item: Any) -> None:
        if isinstance(item, Tensor):
            found.append((path, item))
        elif isinstance(item, tuple | list):
            for index, each in enumerate(item):
                collect((*path, index), each)
        elif isinstance(item, Mapping):
            for key, each in item.items():
                collect((*path, key if isinstance(key, int) else str(key)), each)
        elif (
            is_record(item) or ((inside_objects or (inside_result and not path)) and is_object(item))
        ) and id(item) not in entered:
            entered.add(id(item))
            for key, each in attributes_of(item).items():
                collect((*path, key), each)

    collect((), item)
    return found


def enclosed(item: Any, depth: int = 3) -> list[Any]:
    """What functions refer to that are an item, or stand in it: variables of the functions around them."""
    if isinstance(item, Mapping):
        return [each for value in list(item.values()) for each in enclosed(value, depth)]
    if isinstance(item, tuple | list):
        return [each for value in item for each in enclosed(value, depth)]
    if isinstance(item, partial):
        return [item.args, item.keywords, *enclosed((item.func, item.args), depth)]
    if not isinstance(item, FunctionType) or not depth:
        return []
    found = []
    for cell in item.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:
            continue  # nothing was assigned
        found += [content, *enclosed(content, depth - 1)]
    return found


def is_record(item: Any) -> bool:
    """Whether the item is there to hold named values: a dataclass, or a simple namespace."""
    return isinstance(item, SimpleNamespace) or (
        dataclasses.is_dataclass(item) and not isinstance(item, type | Mapping | nn.Module)
    )


def is_object(item: Any) -> bool:
    """Whether the item is an object with attributes of its own: no module, no function, no class."""
    has_attributes = hasattr(item, "__dict__") or hasattr(type(item), "__slots__")
    return has_attributes and not isinstance(
        item, nn.Module | Tensor | type | ModuleType | FunctionType | MethodType | torch.dtype | torch.device
    )


def attributes_of(item: Any) -> dict[str, Any]:
    """The attributes of an object by name, also where its class has slots for them."""
    found = dict(getattr(item, "__dict__", {}))
    for kind in type(item).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(item, name):
                found[name] = getattr(item, name)
    return found


def map_tensors(item: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nesting of tuples, lists, dictionaries and slices with the tensors changed."""
    if isinstance(item, Tensor):
        return change(item)
    return _map_nested(item, lambda each: map_tensors(each, change))


def map_leaves(item: Any, change: Callable[[Any], Any]) -> Any:
    """The same nesting of tuples, lists, dictionaries and slices with everything else changed."""
    if isinstance(item, tuple | list | dict | slice):
        return _map_nested(item, lambda each: map_leaves(each, change))
    return change(item)


def _map_nested(item: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(item, tuple):
        if hasattr(item, "_fields"):
            return type(item)(*(change(each) for each in item))
        return tuple(change(each) for each in item)
    if isinstance(item, list):
        return [change(each) for each in item]
    if type(item) is dict:
        return {key: change(each) for key, each in item.items()}
    if isinstance(item, slice):
        return slice(change(item.start), change(item.stop), change(item.step))
    return item
