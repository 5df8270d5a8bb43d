"""Tokens to the ranks that hold the experts they chose, and what those make of them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from colrow.collectives import Communicator, Exchange
from colrow.collectives.statistics import current_phase
from colrow.forwards import OwnForward, own_forwards
from colrow.layout import Cut
from colrow.parallel.experts.averaged import averaged
from colrow.parallel.experts.find import Argument, Experts


class Dispatch(OwnForward):
    """The forward of a module with experts: other ranks' tokens through its own experts.

    Each rank of ``ranks`` has tokens of its own and some of the experts. A token travels once to each rank
    that holds an expert it chose, with the choices and weights that concern that rank; there the module's own
    forward takes one choice of a token at a time, and what it makes of them is added up and travels back. No
    token is dropped, however many choose the same expert.

    Gradients: those of tokens and weights are the tokens' own; of a parameter it is the mean over ``ranks``
    of the gradients of their tokens, as that of other parameters is when replicas average them.

    Args:
        module: whose parameters have become those of this rank's experts.
        experts: what is known of it.
        cut: of the experts over the ranks.
        ranks: that divide the experts.
    """

    def __init__(self, module: nn.Module, experts: Experts, cut: Cut, ranks: Communicator) -> None:
        super().__init__(module)
        self.path, self.count, self.cut = experts.path, experts.count, cut
        self.loads = torch.zeros(experts.count, dtype=torch.int64)
        self._places = (experts.tokens, experts.index, experts.weights)
        self._ranks = ranks
        holders = torch.arange(ranks.size).repeat_interleave(torch.tensor(cut.counts))
        self._holders, self._starts = holders, torch.tensor(cut.boundaries[:-1])
        self._is_released = self._is_rehearsal = False

    def release(self) -> None:
        self._is_released = True

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self._is_released:
            return self._inner(arguments, keywords)
        if self._is_rehearsal:
            x, _, weights = (_get(place, arguments, keywords, self.path) for place in self._places)
            return _unused(x, weights, *self._module.parameters())
        return self._dispatched(arguments, keywords)

    # how many rows travel is known in numbers only: a break in the graph
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _dispatched(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        x, index, weights = (_get(place, arguments, keywords, self.path) for place in self._places)
        if x.device != self._holders.device:
            self._holders, self._starts = self._holders.to(x.device), self._starts.to(x.device)
            self.loads = self.loads.to(x.device)
        self._count(index)
        ranks, tokens = self._ranks, x.shape[0]
        # which token goes to which rank, ordered by rank and then by token
        goes = torch.zeros(ranks.size, tokens, dtype=torch.bool, device=x.device)
        holder = self._holders[index]
        goes[holder, torch.arange(tokens, device=x.device)[:, None]] = True
        rank, token = goes.nonzero(as_tuple=True)
        given, taken = self._counts(goes)
        there = holder[token] == rank[:, None]
        local = torch.where(there, index[token] - self._starts[rank][:, None], -1).to(torch.int32)

        out = Exchange(ranks, f"dispatch {self.path}", given, taken)
        pending = out.begin(x.index_select(0, token)), out.begin(weights.index_select(0, token))
        chosen = ranks.start_exchange(local, given, taken, label=f"dispatch {self.path}").wait()
        rows, counted = (one.wait() for one in pending)
        done = self._through_experts(rows, chosen, counted, arguments, keywords)
        back = Exchange(ranks, f"return {self.path}", taken, given)(done)
        return _added(back, token, tokens)

    def _through_experts(
        self,
        rows: Tensor,
        chosen: Tensor,
        weights: Tensor,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Tensor:
        """What this rank's experts make of the rows of all ranks: [rows, features]."""
        row, choice = (chosen >= 0).nonzero(as_tuple=True)
        module = self._module
        if not len(row):
            # the same collectives of gradients as where there are tokens, and gradients that are zero
            return _unused(rows, weights, *module.parameters())
        is_once = len(row) == len(rows)
        x = rows if is_once else rows.index_select(0, row)
        index = chosen[row, choice].long()[:, None]
        counted = weights[row, choice][:, None]
        for place, value in zip(self._places, (x, index, counted), strict=True):
            arguments, keywords = _with(place, value, arguments, keywords)
        with averaged(module, 1 / self._ranks.size):
            result: Tensor = self._inner(arguments, keywords)
        return result if is_once else _added(result, row, len(rows))

    def _counts(self, goes: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How many rows go to each rank, and how many come from each."""
        size = self._ranks.size
        mine = goes.sum(1)
        ones = (1,) * size
        theirs = self._ranks.start_exchange(mine, ones, ones, label=f"counts {self.path}").wait()
        given, taken = torch.stack([mine, theirs]).tolist()
        return tuple(given), tuple(taken)

    def _count(self, index: Tensor) -> None:
        found = torch.bincount(index.reshape(-1), minlength=self.count)
        if len(found) > self.count:
            raise ValueError(
                f"{self.path}: a token chose expert {len(found) - 1}, but only {self.count} have weights and "
                "can be divided over ep. Make the mesh without ep"
            )
        if current_phase() == "forward":  # once, also where activations are recomputed
            self.loads += found


@contextmanager
def rehearsal(model: nn.Module) -> Iterator[None]:
    """In this context experts exchange nothing and give zeros, of the shape and dtype of their results.

    Ranks with other batches may not rehearse at the same time.
    """
    found = [
        forward
        for module in model.modules()
        for forward in own_forwards(module)
        if isinstance(forward, Dispatch)
    ]
    for one in found:
        one._is_rehearsal = True
    try:
        yield
    finally:
        for one in found:
            one._is_rehearsal = False


def _get(place: Argument, arguments: tuple[Any, ...], keywords: dict[str, Any], path: str) -> Tensor:
    value = keywords.get(place.name) if place.name is not None else None
    if value is None and place.position is not None and place.position < len(arguments):
        value = arguments[place.position]
    if not isinstance(value, Tensor) or value.dim() != 2:
        raise ValueError(
            f"{path} is called without {place.name or f'argument {place.position}'} as a tensor of two "
            "dimensions: call it as in the example that colrow.parallelize was given"
        )
    return value


def _with(
    place: Argument, value: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with another value at a place."""
    if place.name is not None and place.name in keywords:
        return arguments, {**keywords, place.name: value}
    position = place.position
    assert position is not None
    return (*arguments[:position], value, *arguments[position + 1 :]), keywords


def _added(rows: Tensor, target: Tensor, count: int) -> Tensor:
    """Rows added up where they belong, among ``count``; half precision is added in float32, rounded once."""
    wide = torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype
    zeros = torch.zeros(count, *rows.shape[1:], dtype=wide, device=rows.device)
    return zeros.index_add(0, target, rows.to(wide)).to(rows.dtype)


def _unused(rows: Tensor, *others: Tensor) -> Tensor:
    """Zeros like ``rows``, whose gradient reaches rows and others as zeros."""
    if torch.is_grad_enabled() and any(one.requires_grad for one in (rows, *others)):
        result: Tensor = _Unused.apply(rows, *others)
        return result
    return torch.zeros_like(rows)


class _Unused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *others: Tensor) -> Tensor:
        ctx.likes = [(one.shape, one.dtype, one.device) for one in (rows, *others)]
        return torch.zeros_like(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(ctx.likes, ctx.needs_input_grad, strict=True)
        )
