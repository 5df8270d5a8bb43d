"""Integers that remember where they came from: an attribute, a tensor's size, or arithmetic on those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Literal:
    """A number from the program's text, or one whose origin is not known."""

    value: int


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module, or of an object that a module holds, such as its configuration.

    ``module`` is the module's path, ``path`` the dotted path of attributes from it: ``config.num_heads``.
    """

    module: str
    path: str
    value: int


@dataclass(frozen=True)
class Size:
    """The extent of a dimension of a traced value, by the value's index."""

    value_index: int
    dimension: int
    value: int


@dataclass(frozen=True)
class Arithmetic:
    """``left symbol right`` for one of ``+ - * // %``."""

    symbol: str
    left: Expression
    right: Expression
    value: int


Expression: TypeAlias = Literal | Attribute | Size | Arithmetic
