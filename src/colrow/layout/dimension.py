"""How the units of an axis lie within one dimension of a tensor.

A dimension is a sum (concatenation) of segments, and a segment is a product ``outer x units x inner``:

===========================  ===================================================================
contiguous                   one segment ``1 x units x inner``: a linear's features, 32 heads x 128
packed ``[q | k | v]``       several segments, each cut alike: GPT-2's ``c_attn``, ``[gate | up]``
interleaved                  ``outer > 1``: the unit's index runs faster than another factor's
grouped, per head            ``inner`` spans all that belongs to one unit: NeoX's heads x (q + k + v),
                             Falcon's groups x (queries + key + value)
whole                        a segment that every rank holds entire: the shared key-value head of MQA
spanning                     a unit belongs to several of the axis: a key-value head to its query heads
===========================  ===================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from colrow.layout.cut import Cut


@dataclass(frozen=True, repr=False)
class Segment:
    """``outer x units x inner`` consecutive indices of which the ``units`` are cut.

    Attributes:
        span: units of the axis that one unit of the segment belongs to: a key-value head belongs to all
            query heads of its group, and every rank that has one of those holds it.
        start: the first unit of the axis that the segment's first unit belongs to.
        whole: the segment is not cut: every rank holds all of it.
    """

    outer: int
    units: int
    inner: int
    whole: bool = False
    span: int = 1
    start: int = 0

    def __repr__(self) -> str:
        more = {"whole": self.whole, "span": self.span if self.span > 1 else 0, "start": self.start}
        text = "".join(f", {name}={value}" for name, value in more.items() if value)
        return f"Segment({self.outer}, {self.units}, {self.inner}{text})"

    @property
    def size(self) -> int:
        return self.outer * self.units * self.inner

    @property
    def stop(self) -> int:
        """The unit of the axis after the last that the segment belongs to."""
        return self.start + self.units * self.span

    def held(self, cut: Cut, rank: int) -> tuple[int, int]:
        """The units of the segment that ``rank`` holds, from the first up to, not including, the last."""
        if self.whole:
            return 0, self.units
        low = max(cut.start(rank) - self.start, 0)
        high = min(cut.stop(rank) - self.start, self.units * self.span)
        return (low // self.span, -(-high // self.span)) if low < high else (0, 0)

    def ranges(self, cut: Cut, rank: int) -> list[tuple[int, int]]:
        """Half-open index ranges, relative to the segment, that ``rank`` holds."""
        low, high = self.held(cut, rank)
        if (low, high) == (0, self.units):
            return [(0, self.size)]
        block = self.units * self.inner
        return [
            (index * block + low * self.inner, index * block + high * self.inner)
            for index in range(self.outer)
        ]


@dataclass(frozen=True)
class DimensionLayout:
    """The segments of one dimension, in order.

    Raises:
        ValueError: if the segments do not belong to axes of one number of units.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        cut = [segment for segment in self.segments if not segment.whole]
        starts = {segment.start for segment in cut}
        stops = {segment.stop for segment in cut}
        # what ends before the last unit is followed by another segment that goes on there
        counts = stops - starts
        if len(counts) != 1 or starts - stops != {0}:
            raise ValueError(
                f"the segments of a dimension must share one axis, not axes of {sorted(counts)} units"
            )

    @classmethod
    def contiguous(cls, size: int, units: int | None = None) -> DimensionLayout:
        """``units`` blocks of ``size / units`` consecutive indices (default: every index is a unit)."""
        return cls.packed([size], size if units is None else units)

    @classmethod
    def packed(cls, sizes: Sequence[int], units: int) -> DimensionLayout:
        """Concatenated parts of ``sizes`` indices, each of which holds all ``units``: ``[q | k | v]``."""
        for size in sizes:
            if units < 1 or size % units:
                raise ValueError(f"{size} indices cannot be cut into {units} equal units")
        return cls(tuple(Segment(1, units, size // units) for size in sizes))

    @classmethod
    def interleaved(cls, outer: int, units: int, inner: int = 1) -> DimensionLayout:
        """``outer`` repetitions of ``units`` blocks of ``inner`` indices."""
        return cls((Segment(outer, units, inner),))

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def units(self) -> int:
        return max(segment.stop for segment in self.segments if not segment.whole)

    @property
    def has_whole(self) -> bool:
        return any(segment.whole for segment in self.segments)

    def is_shared(self, cut: Cut) -> bool:
        """Whether some indices are held by several ranks."""
        return sum(self.local_size(cut, rank) for rank in range(cut.ranks)) > self.size

    def shared(self, cut: Cut) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
        """Ranges of global indices that several ranks hold, in order, each with those ranks."""
        found: list[tuple[tuple[int, int], tuple[int, ...]]] = []
        held = [self.ranges(cut, rank) for rank in range(cut.ranks)]
        borders = sorted({border for ranges in held for pair in ranges for border in pair})
        for low, high in pairwise(borders):
            ranks = tuple(
                rank for rank, ranges in enumerate(held) if any(a <= low and high <= b for a, b in ranges)
            )
            if len(ranks) < 2:
                continue
            if found and found[-1][0][1] == low and found[-1][1] == ranks:
                found[-1] = ((found[-1][0][0], high), ranks)
            else:
                found.append(((low, high), ranks))
        return found

    def ranges(self, cut: Cut, rank: int) -> list[tuple[int, int]]:
        """Half-open ranges of global indices that ``rank`` holds, ascending, adjacent ones merged.

        Raises:
            ValueError: if the cut divides another number of units than this layout has.
        """
        if cut.units != self.units:
            raise ValueError(f"a cut of {cut.units} units does not fit a layout of {self.units}")
        merged: list[tuple[int, int]] = []
        offset = 0
        for segment in self.segments:
            for low, high in segment.ranges(cut, rank):
                if low == high:
                    continue
                if merged and merged[-1][1] == offset + low:
                    merged[-1] = (merged[-1][0], offset + high)
                else:
                    merged.append((offset + low, offset + high))
            offset += segment.size
        return merged

    def local_size(self, cut: Cut, rank: int) -> int:
        """Number of indices that ``rank`` holds."""
        return sum(high - low for low, high in self.ranges(cut, rank))
