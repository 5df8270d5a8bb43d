"""Integers and values among the nested arguments of a call, by their path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from colrow.trace.integers import TracedInt
from colrow.trace.records import FunctionCall, Operation, Value
from colrow.trace.tree import Path

_SLICE = ("start", "stop", "step")


def integers_of(call: FunctionCall) -> dict[Path, int]:
    """The integers among the arguments of a call; the path begins with a position or a keyword."""
    found: dict[Path, int] = {}

    def collect(path: Path, item: Any) -> Any:
        if isinstance(item, int) and not isinstance(item, bool):
            found[path] = item
        return item

    _walk((call.arguments, call.keywords), collect, (), values=False)
    return {path[1:]: number for path, number in found.items()}


def plain_numbers(call: FunctionCall) -> list[tuple[Path, float]]:
    """The numbers among the arguments of a call of which is not known where they come from."""
    found: list[tuple[Path, float]] = []

    def collect(path: Path, item: Any) -> Any:
        if isinstance(item, int | float) and not isinstance(item, bool | TracedInt):
            found.append((path, item))
        return item

    changed(call, collect)
    return found


def values_of(item: Any) -> list[Value]:
    """The values in a nesting, in order."""
    found: list[Value] = []

    def collect(path: Path, each: Any) -> Any:
        if isinstance(each, Value):
            found.append(each)
        return each

    _walk(item, collect, (), values=False)
    return found


def changed(
    call: FunctionCall | Operation, change: Callable[[Path, Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with every leaf changed; paths as of :func:`integers_of`."""
    arguments, keywords = _walk(
        (call.arguments, call.keywords), lambda path, item: change(path[1:], item), (), values=True
    )
    return arguments, keywords


def _walk(item: Any, visit: Callable[[Path, Any], Any], path: Path, *, values: bool) -> Any:
    """Visit every leaf; with ``values`` the same nesting of what ``visit`` gave is returned."""
    if isinstance(item, slice):
        parts = [_walk(getattr(item, name), visit, (*path, name), values=values) for name in _SLICE]
        return slice(*parts) if values else None
    if isinstance(item, dict):
        pairs = {key: _walk(each, visit, (*path, key), values=values) for key, each in item.items()}
        return pairs if values else None
    if isinstance(item, tuple | list):
        each_one = [_walk(each, visit, (*path, index), values=values) for index, each in enumerate(item)]
        return (each_one if isinstance(item, list) else tuple(each_one)) if values else None
    return visit(path, item)


def replaced(item: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """A nesting with the leaf at ``path`` changed; what lies around it is copied, the rest shared."""
    if not path:
        return change(item)
    first, rest = path[0], path[1:]
    if isinstance(item, slice):
        parts = {name: getattr(item, name) for name in _SLICE}
        parts[str(first)] = replaced(parts[str(first)], rest, change)
        return slice(*parts.values())
    if isinstance(item, dict):
        return {**item, first: replaced(item[first], rest, change)}
    assert isinstance(first, int)
    items = list(item)
    items[first] = replaced(items[first], rest, change)
    return items if isinstance(item, list) else tuple(items)
