"""From a factor and one atom of it to the layout of a dimension."""

from __future__ import annotations

from math import prod

from colrow.axes.factor import Factor, find
from colrow.axes.factors import Factors
from colrow.layout.dimension import DimensionLayout, Segment


def dimension_layout(factors: Factors, factor: Factor, atom: Factor) -> DimensionLayout:
    """How the units of ``atom`` lie within a dimension that is ``factor``.

    Raises:
        ValueError: if ``atom`` is not in ``factor``, or more than once for one index.

    >>> from colrow.axes.factor import Reason
    >>> factors = Factors()
    >>> fused = factors.atom(24)
    >>> heads, rest = factors.split(fused, [2, 12], Reason("view(2, 12)"))
    >>> q, kv = factors.cut(rest, [4], Reason("split"))
    >>> dimension_layout(factors, fused, heads).segments
    (Segment(1, 2, 12),)
    >>> dimension_layout(factors, fused, q).segments[:2]
    (Segment(1, 4, 1), Segment(1, 8, 1, whole=True))
    """
    if factors.count(factor, atom) != 1:
        raise ValueError(
            f"an atom of {atom.size} units stands {factors.count(factor, atom)} times in a dimension "
            f"made of {factors.text(factor)}; it must stand there once"
        )
    return DimensionLayout(tuple(_segments(factors, factor, find(atom))))


def _segments(factors: Factors, factor: Factor, atom: Factor) -> list[Segment]:
    root = find(factor)
    if root is atom:
        return [Segment(1, root.size, 1)]
    if not factors.count(root, atom):
        return [Segment(1, root.size, 1, whole=True)]
    if root.kind == "sum":
        return [segment for part in factors.parts(root, "sum") for segment in _segments(factors, part, atom)]
    parts = factors.parts(root, "product")
    at = next(index for index, part in enumerate(parts) if factors.count(part, atom))
    outer = prod(part.size for part in parts[:at])
    inner = prod(part.size for part in parts[at + 1 :])
    segments = [
        Segment(segment.outer, segment.units, segment.inner * inner, segment.whole)
        for segment in _segments(factors, parts[at], atom)
    ]
    if len(segments) == 1:
        (only,) = segments
        return [Segment(outer * only.outer, only.units, only.inner)]
    return segments * outer
