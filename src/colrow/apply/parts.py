"""A rank's part of a value that all hold, and the whole of a value of which ranks hold parts."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from colrow.collectives import AllGather, Communicator, Enter
from colrow.layout import Cut, DimensionLayout, Segment
from colrow.tracer import while_tracing


class Part:
    """Layout of one dimension whose extent may be a multiple of the traced one, as of a batch times heads."""

    def __init__(self, layout: DimensionLayout, cut: Cut, label: str) -> None:
        self._layout, self._cut, self._label = layout, cut, label
        self.of_size = cache(self._of_size)
        self.of_part = cache(self._of_part)

    def _of_size(self, size: int) -> DimensionLayout:
        """The layout for a dimension of ``size``."""
        if size == self._layout.size:
            return self._layout
        if len(self._layout.segments) == 1:
            (segment,) = self._layout.segments
            outer, rest = divmod(size, segment.units * segment.inner)
            if not rest:
                return DimensionLayout((Segment(outer, segment.units, segment.inner, span=segment.span),))
        raise ValueError(
            f"{self._label}: a dimension of {size} cannot be cut as one of {self._layout.size} was when the "
            "plan was made: make the plan from an example of this form"
        )

    def _of_part(self, size: int, rank: int) -> DimensionLayout:
        """The layout of a dimension of which ``rank`` has ``size``."""
        local = self._layout.local_size(self._cut, rank)
        if size == local:
            return self._layout
        if local and len(self._layout.segments) == 1:
            (segment,) = self._layout.segments
            outer, rest = divmod(size, local // segment.outer)
            if not rest:
                return self._of_size(outer * segment.units * segment.inner)
        raise ValueError(f"{self._label}: got {size} of a dimension of which the rank has {local}")

    def indices(self, size: int, rank: int) -> Tensor:
        """The indices of a dimension of ``size`` that ``rank`` has."""
        ranges = self._of_size(size).ranges(self._cut, rank)
        return torch.cat([torch.arange(low, high) for low, high in ranges] or [torch.arange(0)])


class TakePart:
    """I → V: this rank's part of a value that is the same on all ranks; gradients are summed.

    A dimension of extent 1 is left: it stands for all indices.
    """

    def __init__(self, ranks: Communicator, label: str, dimension: int, part: Part) -> None:
        self._ranks, self._part = ranks, part
        self._dimension = dimension
        self._enter = Enter(ranks, label)
        self._known = cache(self._find_ranges)

    @while_tracing
    def _ranges(self, size: int) -> list[tuple[int, int]]:
        return self._known(size)

    def _find_ranges(self, size: int) -> list[tuple[int, int]]:
        return self._part.of_size(size).ranges(self._part._cut, self._ranks.rank)

    def __call__(self, value: Tensor) -> Tensor:
        """The part."""
        size = value.shape[self._dimension]
        if size == 1:
            return value
        if value.requires_grad:
            value = self._enter(value)
        pieces = [value.narrow(self._dimension, low, high - low) for low, high in self._ranges(size)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self._dimension)


class TakeWhole:
    """V → I: the parts of all ranks, each index at its place."""

    def __init__(self, ranks: Communicator, label: str, dimension: int, part: Part) -> None:
        self._ranks, self._label, self._dimension, self._part = ranks, label, dimension, part
        self._known = cache(self._find_places)

    @while_tracing
    def _places(self, size: int) -> tuple[tuple[int, ...], Tensor | None]:
        return self._known(size)

    def _find_places(self, size: int) -> tuple[tuple[int, ...], Tensor | None]:
        """The extents of all parts, and the order of the whole's indices among them if it is another."""
        layout = self._part.of_part(size, self._ranks.rank)
        cut = self._part._cut
        held = [
            torch.cat(
                [torch.arange(low, high) for low, high in layout.ranges(cut, rank)] or [torch.arange(0)]
            )
            for rank in range(self._ranks.size)
        ]
        together = torch.cat(held)
        order = torch.full((layout.size,), -1, dtype=torch.int64)
        order[together.flip(0)] = torch.arange(len(together)).flip(0)  # of what several have, the first
        is_sorted = torch.equal(order, torch.arange(layout.size))
        return tuple(len(one) for one in held), None if is_sorted else order

    def __call__(self, value: Tensor) -> Tensor:
        """The whole."""
        sizes, order = self._places(value.shape[self._dimension])
        gather = AllGather(self._ranks, self._label, self._dimension, sizes, "I")
        whole = gather(value)
        return whole if order is None else whole.index_select(self._dimension, order.to(whole.device))
