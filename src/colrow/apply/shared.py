"""Gradients of parts that several ranks hold: the key-value heads that their query heads share.

Each of the ranks that hold an index of a parameter sees it meet its own queries only, so its gradient is
partial: it is summed over just those ranks.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from colrow.collectives import Communicator
from colrow.layout import Cut, DimensionLayout
from colrow.undo import Undo


class SharedGradient:
    """Sums the gradient of a parameter where several ranks hold the same indices of one dimension."""

    def __init__(
        self, ranks: Communicator, label: str, dimension: int, layout: DimensionLayout, cut: Cut
    ) -> None:
        self._label, self._dimension = label, dimension
        held: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        mine = torch.cat([torch.arange(*pair) for pair in layout.ranges(cut, ranks.rank)])
        for (low, high), members in layout.shared(cut):
            if ranks.rank in members:
                held[members].append(((mine >= low) & (mine < high)).nonzero().flatten())
        # in the same order on all ranks: several groups of one rank must not wait for each other
        self._groups = [
            (ranks.subgroup(members), torch.cat(indices)) for members, indices in sorted(held.items())
        ]

    def attach(self, parameter: nn.Parameter, undo: Undo) -> None:
        """Hook the parameter, if this rank shares any of it."""
        if self._groups and parameter.requires_grad:
            undo.add(parameter.register_hook(self._sum).remove)

    def _sum(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        for group, indices in self._groups:
            indices = indices.to(gradient.device)
            part = gradient.index_select(self._dimension, indices)
            summed = group.start_all_reduce(part, label=self._label, owned=True).wait()
            gradient.index_copy_(self._dimension, indices, summed)
        return gradient
