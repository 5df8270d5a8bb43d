"""Gradients of parts that several ranks hold: the key-value heads that their query heads share.

Each of the ranks that hold an index of a parameter sees it meet its own queries only, so its gradient is
partial: it is summed over just those ranks.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from colrow.collectives import Communicator
from colrow.layout import Cut, DimensionLayout


class SharedPart:
    """Passes a parameter on; sums its gradient where several ranks hold the same indices of a dimension.

    Args:
        ranks: the tensor-parallel group.
        label: names the reduction in errors and statistics.
        dimension: of the parameter that is cut.
        layout, cut: how it is cut.
    """

    def __init__(
        self, ranks: Communicator, label: str, dimension: int, layout: DimensionLayout, cut: Cut
    ) -> None:
        self.label, self.dimension = label, dimension
        held: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        pieces = [torch.arange(*pair) for pair in layout.ranges(cut, ranks.rank)]
        mine = torch.cat(pieces) if pieces else torch.arange(0)
        for (low, high), members in layout.shared(cut):
            if ranks.rank in members:
                held[members].append(((mine >= low) & (mine < high)).nonzero().flatten())
        # in the same order on all ranks: several groups of one rank must not wait for each other
        self.groups = [
            (ranks.subgroup(members), torch.cat(indices)) for members, indices in sorted(held.items())
        ]

    def __call__(self, parameter: Tensor) -> Tensor:
        """The parameter, entered."""
        if not self.groups or not (parameter.requires_grad and torch.is_grad_enabled()):
            return parameter
        return _SumShared.apply(parameter, self)


class _SumShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shared: SharedPart) -> Tensor:
        ctx.shared = shared
        return parameter.view_as(parameter)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        shared = ctx.shared
        gradient = gradient.clone()
        for group, indices in shared.groups:
            indices = indices.to(gradient.device)
            part = gradient.index_select(shared.dimension, indices)
            summed = group.start_all_reduce(part, label=shared.label, owned=True).wait()
            gradient.index_copy_(shared.dimension, indices, summed)
        return gradient, None
