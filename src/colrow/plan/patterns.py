"""Alike things of repeated layers together: names with ``*`` in place of the numbers that differ."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?![^.,): ])|(?<![^ ])[0-9]+(?=\.)")
"""A number that is a whole part of a dotted name, within a name or a sentence."""

_GAP = "\0"

Kind = TypeVar("Kind", bound=Hashable)


@dataclass(frozen=True)
class Merged:
    """Texts that are alike but for numbers of layers.

    Attributes:
        text: with ``*`` for the numbers that differ.
        count: how many there are.
        numbers: for each ``*``, the numbers that stand for it, ascending.
    """

    text: str
    count: int
    numbers: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return self.text

    @property
    def ranges(self) -> str:
        """The numbers as ranges: ``0-125`` or ``0, 2-5``, one for each ``*``."""
        return " x ".join(ranges(numbers) for numbers in self.numbers)


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges: ``0-3, 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def merge(texts: Iterable[tuple[str, Kind]]) -> list[tuple[Merged, Kind]]:
    """Texts of one kind that differ only in numbers, together, in the order of their first ones.

    Numbers that are the same in all of them stay: ``blocks.*.mlp.0.weight``.
    """
    groups: dict[tuple[str, Kind], list[tuple[int, ...]]] = {}
    for text, kind in texts:
        skeleton = _NUMBER.sub(_GAP, text)
        groups.setdefault((skeleton, kind), []).append(tuple(map(int, _NUMBER.findall(text))))
    return [(_merged(skeleton, found), kind) for (skeleton, kind), found in groups.items()]


def merge_texts(texts: Iterable[str]) -> list[Merged]:
    """:func:`merge` of texts of one kind."""
    return [merged for merged, _ in merge((text, None) for text in texts)]


def _merged(skeleton: str, found: list[tuple[int, ...]]) -> Merged:
    columns = [tuple(sorted(set(column))) for column in zip(*found, strict=True)]
    parts = skeleton.split(_GAP)
    text = parts[0]
    for column, part in zip(columns, parts[1:], strict=True):
        text += (str(column[0]) if len(column) == 1 else "*") + part
    return Merged(text, len(found), tuple(column for column in columns if len(column) > 1))
