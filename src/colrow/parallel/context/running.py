"""What is known while a model runs on a rank's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from colrow.collectives import AllGather, Communicator
from colrow.parallel.context.attention import Method
from colrow.parallel.context.plan import Extent
from colrow.parallel.context.share import Order, SequenceShare


class Running:
    """The group over which a model's sequences are cut, and the share of the forward that runs.

    Args:
        ranks: the group.
        method: of all attentions.
        order: of the tokens.

    Attributes:
        counts: how many attentions and losses the forward has passed.
    """

    def __init__(self, ranks: Communicator, method: Method, order: Order) -> None:
        self.ranks, self.method, self.order = ranks, method, order
        self.counts = [0, 0]
        self._share: SequenceShare | None = None
        self._places: tuple[SequenceShare, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Running:
        return self  # what runs is known in the copy of a model too

    @property
    def share(self) -> SequenceShare:
        """Of the forward that runs, or that is recomputed.

        Raises:
            RuntimeError: if none does.
        """
        if self._share is None:
            raise RuntimeError(
                "a part of the model was called by itself; its sequences are cut over ranks (cp), and how "
                "long they are is known in calls of the whole model only"
            )
        return self._share

    @contextmanager
    def of(self, share: SequenceShare) -> Iterator[None]:
        """A context in which ``share`` is known."""
        before, self._share = self._share, share
        try:
            yield
        finally:
            self._share = before

    # ---------------------------------------------------------------- tokens of tensors

    def take(self, whole: Tensor, extent: Extent) -> Tensor:
        """This rank's tokens of what all ranks have; the gradient is that of these tokens, zeros elsewhere.

        Raises:
            ValueError: if the tensor is not one of the sequence's length.
        """
        share, dimension = self.share, extent.dimension
        step = share.length * extent.inner
        if whole.dim() <= dimension or whole.shape[dimension] % max(1, step):
            raise ValueError(
                f"a tensor of shape {list(whole.shape)} has not {share.length} tokens in dimension "
                f"{dimension}: call the model as in the examples that it was parallelized with"
            )
        places = self._places_of(share, whole.device)
        if whole.shape[dimension] == step == share.length:
            return whole.index_select(dimension, places)
        rows = whole.unflatten(dimension, (-1, share.length, extent.inner))
        return rows.index_select(dimension + 1, places).flatten(dimension, dimension + 2)

    def _places_of(self, share: SequenceShare, device: torch.device) -> Tensor:
        """This rank's tokens; the last are kept, as every layer may ask."""
        if self._places is None or self._places[0] != share or self._places[1].device != device:
            self._places = share, share.places(self.ranks.rank).to(device)
        return self._places[1]

    def join(self, part: Tensor, extent: Extent, label: str) -> Tensor:
        """All tokens, of which every rank gives its own.

        All ranks go on to do the same with them. Gradients of parameters are averaged over the ranks, and
        each finds those of its own tokens: these count as many times as there are ranks.
        """
        share, dimension = self.share, extent.dimension
        tokens = share.counts[self.ranks.rank]
        rows = Repeated.apply(part, self.ranks.size) if part.requires_grad else part
        is_plain = part.shape[dimension] == tokens and extent.inner == 1
        if not is_plain:
            rows = rows.unflatten(dimension, (-1, tokens, extent.inner))
        along = dimension if is_plain else dimension + 1
        whole = AllGather(self.ranks, label, along, share.counts, "I")(rows)
        order = share.from_parts()
        if order is not None:
            whole = whole.index_select(along, order.to(whole.device))
        return whole if is_plain else whole.flatten(dimension, dimension + 2)


class Repeated(torch.autograd.Function):
    """The identity; the gradient counts several times, as one of so many of which the mean is taken."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> Tensor:
        ctx.times = times
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.times, None


class TakenAtDoor(torch.autograd.Function):
    """A rank's tokens of an argument of the model, whose gradient is whole on every rank, like that of one
    device."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, running: Running, extent: Extent) -> Tensor:
        ctx.running, ctx.extent, ctx.share = running, extent, running.share
        return running.take(whole, extent)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        running: Running = ctx.running
        with running.of(ctx.share):
            whole = running.join(gradient, ctx.extent, "gradient of the model's argument")
        return whole / running.ranks.size, None, None
