"""How the units of an axis lie within one dimension of a tensor.

A dimension is a sum (concatenation) of segments, and a segment is a product ``outer x units x inner``:

===========================  ===================================================================
contiguous                   one segment ``1 x units x inner``: a linear's features, 32 heads x 128
packed ``[q | k | v]``       several segments, each cut alike: GPT-2's ``c_attn``, ``[gate | up]``
interleaved                  ``outer > 1``: the unit's index runs faster than another factor's
grouped, per head            ``inner`` spans all that belongs to one unit: NeoX's heads x (q + k + v),
                             Falcon's groups x (queries + key + value)
whole                        a segment that every rank holds entire: the shared key-value head of MQA
===========================  ===================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colrow.layout.cut import Cut


@dataclass(frozen=True)
class Segment:
    """``outer x units x inner`` consecutive indices of which the ``units`` are cut.

    With ``whole`` the segment is not cut: every rank holds all of it.
    """

    outer: int
    units: int
    inner: int
    whole: bool = False

    @property
    def size(self) -> int:
        return self.outer * self.units * self.inner

    def ranges(self, cut: Cut, rank: int) -> list[tuple[int, int]]:
        """Half-open index ranges, relative to the segment, that ``rank`` holds."""
        if self.whole:
            return [(0, self.size)]
        block = self.units * self.inner
        low, high = cut.start(rank) * self.inner, cut.stop(rank) * self.inner
        return [(index * block + low, index * block + high) for index in range(self.outer)]


@dataclass(frozen=True)
class DimensionLayout:
    """The segments of one dimension, in order.

    Raises:
        ValueError: if the segments disagree on the number of units.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        counts = {segment.units for segment in self.segments if not segment.whole}
        if len(counts) != 1:
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
        return next(segment.units for segment in self.segments if not segment.whole)

    @property
    def has_whole(self) -> bool:
        return any(segment.whole for segment in self.segments)

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
