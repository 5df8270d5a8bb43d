"""From a factor and the atoms that are cut in it to the layout of a dimension, and to a rank's indices."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from colrow.axes.factor import Factor, find
from colrow.axes.factors import Factors
from colrow.layout.dimension import DimensionLayout, Segment


def dimension_layout(
    factors: Factors, factor: Factor, atom: Factor, within: Factor | None = None
) -> DimensionLayout:
    """How the units of ``atom`` lie within a dimension that is ``factor``.

    Args:
        factors: the arena.
        factor: the dimension.
        atom: what is cut.
        within: another atom of which each unit is cut further along ``atom``: the groups of queries that
            share a key-value head. The units of the axis are then those of ``within x atom``, and a dimension
            of groups alone has units that span several of them.

    Raises:
        ValueError: if an atom is not in ``factor``, or more than once for one index, or if ``atom`` does not
            lie inside of ``within``.

    >>> from colrow.axes.factor import Reason
    >>> factors = Factors()
    >>> fused = factors.atom(24)
    >>> heads, rest = factors.split(fused, [2, 12], Reason("view(2, 12)"))
    >>> q, kv = factors.cut(rest, [4], Reason("split"))
    >>> dimension_layout(factors, fused, heads).segments
    (Segment(1, 2, 12),)
    >>> dimension_layout(factors, fused, q).segments[:2]
    (Segment(1, 4, 1), Segment(1, 8, 1, whole=True))
    >>> dimension_layout(factors, heads, q, within=heads).segments
    (Segment(1, 2, 1, span=4),)
    >>> dimension_layout(factors, fused, q, within=heads).segments[2:]
    (Segment(1, 4, 1, start=4), Segment(1, 1, 8, span=4, start=4))
    """
    needed = atom if within is None else within
    if factors.count(factor, needed) != 1 or factors.count(factor, atom) > 1:
        raise ValueError(
            f"an atom of {needed.size} units stands {factors.count(factor, needed)} times in a dimension "
            f"made of {factors.text(factor)}; it must stand there once"
        )
    layout = _Layout(factors, find(atom), None if within is None else find(within))
    return DimensionLayout(tuple(layout.segments(factor, None)))


class _Layout:
    def __init__(self, factors: Factors, atom: Factor, within: Factor | None) -> None:
        self._factors, self._atom, self._within = factors, atom, within
        self._span = 1 if within is None else atom.size

    def _holds(self, factor: Factor, group: int | None) -> bool:
        """Whether something of ``factor`` is cut, given the group that it lies in."""
        wanted = self._atom if self._within is None or group is not None else self._within
        return self._factors.count(factor, wanted) > 0

    def segments(self, factor: Factor, group: int | None) -> list[Segment]:
        """The segments of ``factor``, which lies in unit ``group`` of the outer atom, if in any."""
        root = find(factor)
        start = 0 if group is None else group * self._span
        if root is self._atom:
            if self._within is not None and group is None:
                raise ValueError(f"an atom of {root.size} units lies outside of the one it should lie in")
            return [Segment(1, root.size, 1, start=start)]
        if root is self._within:
            return [Segment(1, root.size, 1, span=self._span)]
        if not self._holds(root, group):
            if self._factors.count(root, self._atom):
                raise ValueError(f"{self._factors.text(root)} lies outside of the atom it should lie in")
            if group is None:
                return [Segment(1, root.size, 1, whole=True)]
            return [Segment(1, 1, root.size, span=self._span, start=start)]
        if root.kind == "sum":
            parts = self._factors.parts(root, "sum")
            return [segment for part in parts for segment in self.segments(part, group)]
        return self._product(self._factors.parts(root, "product"), group)

    def _product(self, parts: list[Factor], group: int | None) -> list[Segment]:
        at = next(index for index, part in enumerate(parts) if self._holds(part, group))
        outer = prod(part.size for part in parts[:at])
        rest = parts[at + 1 :]
        inner = prod(part.size for part in rest)
        if parts[at] is self._within and any(self._factors.count(part, self._atom) for part in rest):
            if rest[0] is self._atom:
                inner = prod(part.size for part in rest[1:])
                return [Segment(outer, parts[at].size * self._span, inner)]
            below = self._factors.product(rest)
            found = [one for index in range(parts[at].size) for one in self.segments(below, index)]
            return found * outer
        found = [
            Segment(each.outer, each.units, each.inner * inner, each.whole, each.span, each.start)
            for each in self.segments(parts[at], group)
        ]
        if len(found) == 1:
            (only,) = found
            return [Segment(outer * only.outer, only.units, only.inner, only.whole, only.span, only.start)]
        return found * outer


def held_indices(factors: Factors, factor: Factor, held: Mapping[int, tuple[int, int]]) -> Tensor | None:
    """The indices of a dimension that remain when atoms keep only some of theirs.

    Args:
        held: first and last (exclusive) unit that each cut atom keeps, by the atom's index.

    Returns:
        Ascending indices, int64; ``None`` if none of the atoms is in ``factor``.
    """
    root = find(factor)
    if root.kind == "atom":
        return torch.arange(*held[root.index]) if root.index in held else None
    if not any(atom.index in held for atom in factors.atoms(root)):
        return None
    if root.kind == "sum":
        pieces, start = [], 0
        for part in factors.parts(root, "sum"):
            kept = held_indices(factors, part, held)
            pieces.append(start + (torch.arange(part.size) if kept is None else kept))
            start += part.size
        return torch.cat(pieces)
    found = torch.zeros(1, dtype=torch.int64)
    for part in factors.parts(root, "product"):
        kept = held_indices(factors, part, held)
        kept = torch.arange(part.size) if kept is None else kept
        found = (found[:, None] * part.size + kept).flatten()
    return found
