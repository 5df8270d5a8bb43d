"""A configuration with its nested ones as plain dictionaries that can be changed and built again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colrow.model.fields import Role, role_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass
class Node:
    """One configuration of a tree.

    Attributes:
        key: the field that holds it; empty for the outermost.
        config: as it was, not to be changed.
        data: its fields, to be changed; part of the tree's one nested dictionary.
        before: its fields as they were.
    """

    key: str
    config: PreTrainedConfig
    data: dict[str, Any]
    before: dict[str, Any]

    def role(self, field: str) -> Role:
        """What a field of this configuration means."""
        standard = {own: name for name, own in type(self.config).attribute_map.items()}
        return role_of(field, standard)

    def number(self, name: str) -> int | None:
        """An integer by transformers' standard name, as it was."""
        own = type(self.config).attribute_map.get(name, name)
        value = self.before[own] if own in self.before else getattr(self.config, own, None)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def fields(self, *roles: Role) -> Iterator[tuple[str, Any]]:
        """The fields of certain roles with their present values."""
        for name, value in list(self.data.items()):
            if self.role(name) in roles:
                yield name, value

    def change(self, function: Callable[[int], int], *roles: Role) -> None:
        """Put ``function(number)`` in the place of every integer in the fields of certain roles."""
        for name, value in self.fields(*roles):
            self.data[name] = map_numbers(value, function)


class Tree:
    """All nodes of a configuration, outermost first."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.data = copy.deepcopy(config.to_dict())
        self.nodes: list[Node] = []
        self._add("", config, self.data)

    def _add(self, key: str, config: PreTrainedConfig, data: dict[str, Any]) -> None:
        from transformers import PreTrainedConfig

        self.nodes.append(Node(key, config, data, dict(data)))
        for name, value in data.items():
            inner = vars(config).get(name)
            if isinstance(inner, PreTrainedConfig) and isinstance(value, dict):
                self._add(name, inner, value)

    def change(self, function: Callable[[int], int], *roles: Role) -> None:
        """:meth:`Node.change` in all nodes."""
        for node in self.nodes:
            node.change(function, *roles)

    def build(self) -> PreTrainedConfig:
        """A new configuration of the changed fields."""
        return type(self.config).from_dict(copy.deepcopy(self.data))


def map_numbers(value: Any, change: Callable[[int], int]) -> Any:
    """The same nesting of lists with its integers changed."""
    if isinstance(value, int) and not isinstance(value, bool):
        return change(value)
    if isinstance(value, list | tuple):
        return [map_numbers(one, change) for one in value]
    return value


def numbers(value: Any) -> Iterator[int]:
    """The integers of a nesting of lists."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from numbers(one)
