"""Ring attention: queries stay, keys and values travel from rank to rank.

Each rank attends to the keys and values that it has while those of the previous rank arrive, and adds the
blocks up by the logarithms of their sums of exponentials (Liu et al. 2023, "Ring Attention with Blockwise
Transformers", https://arxiv.org/abs/2310.01889). In the backward pass keys and values travel once more, and
their gradients behind them, to which each rank adds its own. All sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colrow.collectives import Communicator, Pending
from colrow.parallel.context.block import Block, wide_dtype
from colrow.parallel.context.share import SequenceShare

_NO_SECOND_DERIVATIVE = (
    "ring attention has no second derivative: call backward without create_graph, or use method='ulysses'"
)


@dataclass(frozen=True)
class Ring:
    """Attention over all ranks' keys.

    Attributes:
        ranks: the group over which the sequence is cut.
        share: which tokens each rank has.
        is_causal: a query attends to what is not behind it in the sequence.
        scale: by which scores are multiplied.
        label: names the exchanges.
    """

    ranks: Communicator
    share: SequenceShare
    is_causal: bool
    scale: float
    label: str

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, heads, this rank's tokens, value width], V.

        Args:
            query: [batch, heads, this rank's tokens, width], V.
            key, value: [batch, key-value heads, this rank's tokens, width or value width], V.
        """
        result: Tensor = _RingAttention.apply(query, key, value, self)
        return result

    def blocks(self, source: int) -> tuple[Block, slice, slice] | None:
        """How this rank attends to the keys of rank ``source``: which queries, to which keys, by what mask.

        ``None`` if no query attends to any. That it is one block at most is why ranks have early and late
        tokens in this order: all of a rank's tokens attend to the early ones of those before it in the ring,
        and its late ones to all of those behind it.
        """
        mine, rank = self.share.pieces(self.ranks.rank), self.ranks.rank
        theirs = self.share.pieces(source)
        all_mine, all_theirs = _tokens(mine), _tokens(theirs)
        queries, keys = slice(0, all_mine), slice(0, all_theirs)
        if self.is_causal and source < rank:
            keys = slice(0, _tokens(theirs[:1]))
        elif self.is_causal and source > rank:
            if self.share.order == "contiguous":
                return None
            queries = slice(_tokens(mine[:1]), all_mine)
        if queries.start == queries.stop or keys.start == keys.stop:
            return None
        return Block(self.is_causal and source == rank, self.scale), queries, keys

    def pass_on(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Keys and values of all ranks, this one's first, with the rank that they are of.

        The next ones are under way while the caller works on those that it was given.
        """
        ranks, counts = self.ranks, self.share.counts
        packed = torch.cat([key.reshape(-1), value.reshape(-1)]) if ranks.size > 1 else key
        for step in range(ranks.size):
            source = (ranks.rank - step) % ranks.size
            incoming: Pending | None = None
            if step + 1 < ranks.size:
                tokens = counts[source - 1]
                features = key.shape[0] * key.shape[1] * (key.shape[3] + value.shape[3])
                incoming = ranks.start_shift(packed, [tokens * features], label=self.label)
            yield source, key, value
            if incoming is not None:
                packed = incoming.wait()
                key, value = _unpacked(packed, key, value, tokens)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
        wide = wide_dtype(query.dtype)
        total = query.new_zeros((*query.shape[:-1], value.shape[-1]), dtype=wide)
        log_sum = query.new_full(query.shape[:-1], -torch.inf, dtype=wide)
        for source, keys, values in ring.pass_on(key, value):
            found = ring.blocks(source)
            if found is None:
                continue
            block, rows, columns = found
            output, logs = block.forward(query[:, :, rows], keys[:, :, columns], values[:, :, columns])
            before, logs = log_sum[:, :, rows], logs.to(wide)
            after = torch.logaddexp(before, logs)
            total[:, :, rows] = total[:, :, rows] * (before - after).exp_().unsqueeze(-1) + output.to(
                wide
            ) * (logs - after).exp_().unsqueeze(-1)
            log_sum[:, :, rows] = after
        result = total.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, log_sum)
        ctx.ring = ring
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(_NO_SECOND_DERIVATIVE)
        query, key, value, result, log_sum = ctx.saved_tensors
        ring: Ring = ctx.ring
        wide = wide_dtype(query.dtype)
        of_query = torch.zeros_like(query, dtype=wide)
        travelling = _Gradients(ring, key, value, wide)
        for source, keys, values in ring.pass_on(key, value):
            found = ring.blocks(source)
            own: tuple[Tensor, Tensor] | None = None
            if found is not None:
                block, rows, columns = found
                of_rows, of_keys, of_values = block.backward(
                    gradient[:, :, rows].contiguous(),
                    query[:, :, rows],
                    keys[:, :, columns],
                    values[:, :, columns],
                    result[:, :, rows].contiguous(),
                    log_sum[:, :, rows].contiguous(),
                )
                of_query[:, :, rows] += of_rows
                own = of_keys, of_values
            travelling.add(keys, values, own, columns if found is not None else slice(0))
        of_key, of_value = travelling.home()
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None


class _Gradients:
    """The gradients of keys and values, which follow them round the ring.

    Args:
        ring: in which they travel.
        key, value: this rank's own.
        dtype: in which they are added up.
    """

    def __init__(self, ring: Ring, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
        self._ring, self._key, self._value, self._dtype = ring, key, value, dtype
        self._incoming: Pending | None = None
        self._step = 0

    def add(self, keys: Tensor, values: Tensor, own: tuple[Tensor, Tensor] | None, columns: slice) -> None:
        """Add ``own`` to what the previous ranks found for ``columns`` of these keys, and send it on."""
        if self._incoming is None:
            size = keys.numel() + values.numel()
            packed = keys.new_zeros(size, dtype=self._dtype)
        else:
            packed = self._incoming.wait()
        of_keys, of_values = _unpacked(packed, keys, values, keys.shape[2])
        if own is not None:
            of_keys[:, :, columns] += own[0]
            of_values[:, :, columns] += own[1]
        self._step += 1
        ranks = self._ring.ranks
        # what comes next are the gradients of what this rank works on next, at last of its own
        source = (ranks.rank - self._step) % ranks.size
        tokens = self._ring.share.counts[source]
        features = packed.numel() // max(1, keys.shape[2])
        if not keys.shape[2]:
            features = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
        label = f"{self._ring.label} gradients"
        self._incoming = ranks.start_shift(packed, [tokens * features], label=label)

    def home(self) -> tuple[Tensor, Tensor]:
        """The sums of this rank's own."""
        assert self._incoming is not None
        return _unpacked(self._incoming.wait(), self._key, self._value, self._key.shape[2])


def _unpacked(packed: Tensor, key: Tensor, value: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Views of keys and values of ``tokens`` tokens, otherwise as ``key`` and ``value``, in one row."""
    shapes = [[*one.shape[:2], tokens, one.shape[3]] for one in (key, value)]
    first, second = packed.split([torch.Size(shape).numel() for shape in shapes])
    return first.view(shapes[0]), second.view(shapes[1])


def _tokens(pieces: tuple[tuple[int, int], ...]) -> int:
    return sum(stop - start for start, stop in pieces)
