"""How linear layers come by the value that they read in a backward pass, and what becomes of its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from colrow.collectives import AllGather, AllReduce, Communicator, Pending, ReduceScatter


class Input(Protocol):
    """A value that column-parallel layers read, of which autograd keeps ``kept``.

    Each rank knows a part of the value's gradient: the sum over the ranks is that of what is kept.
    """

    @property
    def ranks(self) -> Communicator:
        """The group."""

    @property
    def label(self) -> str:
        """Names its collectives in errors and statistics."""

    def start_whole(self, kept: Tensor) -> Pending | None:
        """The value, for gradients of weights; ``None``: it is what is kept."""

    def start_sum(self, gradient: Tensor) -> Pending:
        """From the value's gradient on this rank that of what is kept; ``gradient`` may be written into."""

    def sum(self, gradient: Tensor) -> Tensor:
        """:meth:`start_sum`, differentiable."""


@dataclass(frozen=True, slots=True)
class WholeInput:
    """I: the same on all ranks, and kept. An all-reduce backward."""

    ranks: Communicator
    label: str

    def start_whole(self, kept: Tensor) -> None:
        """See :class:`Input`."""

    def start_sum(self, gradient: Tensor) -> Pending:
        """See :class:`Input`."""
        return self.ranks.start_all_reduce(gradient, label=self.label, owned=True)

    def sum(self, gradient: Tensor) -> Tensor:
        """See :class:`Input`."""
        return AllReduce(self.ranks, self.label)(gradient)


@dataclass(frozen=True, slots=True)
class GatheredInput:
    """V: each rank keeps its part, along a dimension. A reduce-scatter backward, and an all-gather again.

    Attributes:
        ranks, label: of the collectives.
        dimension: along which it is cut.
        parts: extent on each rank.
    """

    ranks: Communicator
    label: str
    dimension: int
    parts: tuple[int, ...]

    def start_whole(self, kept: Tensor) -> Pending:
        """The parts of all ranks."""
        if torch.is_grad_enabled():  # a second derivative will be taken
            gather = AllGather(self.ranks, self.label, self.dimension, self.parts, "R")
            return Pending.completed(gather(kept))
        return self.ranks.start_all_gather(kept, self.dimension, self.parts, label=self.label)

    def start_sum(self, gradient: Tensor) -> Pending:
        """See :class:`Input`."""
        return self.ranks.start_reduce_scatter(gradient, self.dimension, self.parts, label=self.label)

    def sum(self, gradient: Tensor) -> Tensor:
        """See :class:`Input`."""
        return ReduceScatter(self.ranks, self.label, self.dimension, self.parts)(gradient)
