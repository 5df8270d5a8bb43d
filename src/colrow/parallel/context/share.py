"""Which tokens of a sequence each rank has."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from colrow.layout import Cut

Order = Literal["contiguous", "zigzag"]


@dataclass(frozen=True)
class SequenceShare:
    """The tokens of a sequence, divided over the ranks of a group as evenly as they go.

    Attributes:
        length: of the whole sequence.
        ranks: size of the group.
        order: ``"contiguous"``: each rank has one piece. ``"zigzag"``: of twice as many pieces as there are
            ranks, rank r has the r-th and the r-th from the end, so that under a causal mask all ranks have
            as much to do: what comes early attends to little, what comes late to much.
    """

    length: int
    ranks: int
    order: Order

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.length < 0:
            raise ValueError(f"{self.length} tokens cannot be divided over {self.ranks} ranks")

    def pieces(self, rank: int) -> tuple[tuple[int, int], ...]:
        """First and last (exclusive) token of each piece that ``rank`` has, in order."""
        bounds = [0, *accumulate(self._pieces())]
        mine = [rank] if self.order == "contiguous" else [rank, 2 * self.ranks - 1 - rank]
        return tuple((bounds[piece], bounds[piece + 1]) for piece in mine)

    def _pieces(self) -> tuple[int, ...]:
        pieces = self.ranks if self.order == "contiguous" else 2 * self.ranks
        return Cut.balanced(self.length, pieces).counts

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tokens each rank has."""
        return tuple(sum(stop - start for start, stop in self.pieces(rank)) for rank in range(self.ranks))

    def places(self, rank: int) -> Tensor:
        """The positions of the tokens of ``rank`` in the sequence: [tokens], int64, ascending."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.pieces(rank)])

    def to_parts(self) -> Tensor | None:
        """The positions in the sequence of all ranks' tokens, one rank after the other: [length], int64.

        ``None`` if that is the order of the sequence.
        """
        if self.order == "contiguous" or self.ranks == 1:
            return None
        return torch.cat([self.places(rank) for rank in range(self.ranks)])

    def from_parts(self) -> Tensor | None:
        """Where each token of the sequence stands when the parts of all ranks are joined: [length], int64.

        ``None`` if joined parts are the sequence.
        """
        order = self.to_parts()
        if order is None:
            return None
        return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
