"""Slicing a global tensor into a rank's shard, and assembling it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor

from colrow.layout.cut import Cut
from colrow.layout.dimension import DimensionLayout


@dataclass(frozen=True)
class TensorLayout:
    """Which index ranges of a global tensor each rank holds.

    Attributes:
        shape: the global shape.
        dimensions: per cut dimension its layout and the cut of its axis. Dimensions that are not named
            are whole on every rank; no entry at all means replicated.
        window: of other dimensions, the range of indices that these ranks hold, all of them alike: the
            experts of their place along ``ep``.

    Raises:
        ValueError: if a layout's size is not the dimension's, or cuts name different numbers of ranks.
    """

    shape: tuple[int, ...]
    dimensions: Mapping[int, tuple[DimensionLayout, Cut]] = field(default_factory=dict)
    window: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for dimension, (layout, cut) in self.dimensions.items():
            if not 0 <= dimension < len(self.shape) or layout.size != self.shape[dimension]:
                raise ValueError(
                    f"a layout of {layout.size} indices does not fit dimension {dimension} "
                    f"of the shape {list(self.shape)}"
                )
            if layout.units != cut.units:
                raise ValueError(f"a cut of {cut.units} units does not fit a layout of {layout.units}")
        if len({cut.ranks for _, cut in self.dimensions.values()}) > 1:
            raise ValueError("the cuts of one tensor must be over one number of ranks")
        for dimension, (low, high) in self.window.items():
            if dimension in self.dimensions or not 0 <= low <= high <= self.shape[dimension]:
                raise ValueError(
                    f"a window of {low} to {high} does not fit dimension {dimension} of the shape "
                    f"{list(self.shape)}, cut along {list(self.dimensions)}"
                )

    @property
    def is_sharded(self) -> bool:
        return bool(self.dimensions)

    @property
    def is_part(self) -> bool:
        """Whether a rank holds less than the whole tensor: a shard, a window, or both."""
        return bool(self.dimensions or self.window)

    @property
    def without_window(self) -> TensorLayout:
        """The layout where the windows of all places have been joined."""
        return replace(self, window={})

    @property
    def is_shared(self) -> bool:
        """Whether several ranks, but not as replicas of all of it, hold the same part."""
        return any(layout.is_shared(cut) for layout, cut in self.dimensions.values())

    def owned(self, shard: Tensor, rank: int) -> list[Tensor]:
        """The parts of a shard that count as those of ``rank``: of what several ranks hold, the first's.

        Views of ``shard``, along the one dimension that is cut.
        """
        pieces = [shard]
        for dimension, (layout, cut) in self.dimensions.items():
            others = [pair for pair, ranks in layout.shared(cut) if rank in ranks[1:]]
            kept, position = [], 0
            for low, high in layout.ranges(cut, rank):
                borders = sorted({low, high, *(one for pair in others for one in pair if low < one < high)})
                for start, stop in pairwise(borders):
                    if not any(a <= start and stop <= b for a, b in others):
                        kept.append((position + start - low, stop - start))
                position += high - low
            pieces = [piece.narrow(dimension, start, length) for piece in pieces for start, length in kept]
        return pieces

    def ranges(self, dimension: int, rank: int) -> list[tuple[int, int]]:
        """Half-open global index ranges of ``dimension`` that ``rank`` holds."""
        if dimension not in self.dimensions:
            return [self.window.get(dimension, (0, self.shape[dimension]))]
        layout, cut = self.dimensions[dimension]
        return layout.ranges(cut, rank)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        return tuple(
            sum(high - low for low, high in self.ranges(dimension, rank))
            for dimension in range(len(self.shape))
        )

    def local_numel(self, rank: int) -> int:
        return prod(self.local_shape(rank))

    def slice(self, tensor: Tensor, rank: int) -> Tensor:
        """The shard of ``rank``: a contiguous tensor that shares no memory with ``tensor``.

        Raises:
            ValueError: if ``tensor`` does not have the global shape.
        """
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"expected the global shape {list(self.shape)}, got {list(tensor.shape)}")
        for dimension in (*self.dimensions, *self.window):
            pieces = [tensor.narrow(dimension, low, high - low) for low, high in self.ranges(dimension, rank)]
            if not pieces:
                tensor = tensor.narrow(dimension, 0, 0)
            else:
                tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dimension)
        return tensor.clone(memory_format=torch.contiguous_format)

    def place(self, shard: Tensor, rank: int, out: Tensor) -> None:
        """Write the shard of ``rank`` where it belongs in the global tensor ``out``, in place.

        Raises:
            ValueError: if ``shard`` does not have the local shape of ``rank``.
        """
        if tuple(shard.shape) != self.local_shape(rank):
            raise ValueError(
                f"rank {rank} holds the shape {list(self.local_shape(rank))}, got {list(shard.shape)}"
            )
        axes = [self.ranges(dimension, rank) for dimension in range(len(self.shape))]
        for block in product(*axes):
            source, target = shard, out
            for dimension, (low, high) in enumerate(block):
                before = sum(stop - start for start, stop in axes[dimension] if stop <= low)
                source = source.narrow(dimension, before, high - low)
                target = target.narrow(dimension, low, high - low)
            target.copy_(source)

    def assemble(self, shards: Sequence[Tensor]) -> Tensor:
        """The global tensor of the shards of all ranks, in rank order: the inverse of :meth:`slice`.

        Parts that several ranks hold (whole segments, replicated tensors) are taken from the last one.
        """
        if not self.dimensions:
            return shards[0].clone()
        out = shards[0].new_empty(self.shape)
        for rank, shard in enumerate(shards):
            self.place(shard, rank, out)
        return out
