"""The plain collectives through ``torch.distributed``: what is sent, and how the result comes of it.

Each function gives a call that begins the collective, and one that makes the result once it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.collectives.pending import Work
from colrow.collectives.shapes import in_a_row, pad

if TYPE_CHECKING:
    from colrow.collectives.rank_group import RankGroup

Begun: TypeAlias = tuple[Callable[[], Work | None], Callable[[], Tensor]]

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renamed these two and warns about the old names
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_reduced = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(ranks: RankGroup, tensor: Tensor, reduction: str, owned: bool) -> Begun:
    """See :meth:`Communicator.start_all_reduce`."""
    buffer = _to_reduce(tensor, ranks.sum_dtype(tensor.dtype) if reduction == "sum" else tensor.dtype, owned)
    return (
        lambda: dist.all_reduce(buffer, _REDUCTIONS[reduction], group=ranks.group, async_op=True),
        lambda: buffer.to(tensor.dtype),
    )


def all_gather(ranks: RankGroup, shard: Tensor, dimension: int, sizes: Sequence[int]) -> Begun:
    """See :meth:`Communicator.start_all_gather`. Shards are padded to equal sizes."""
    source = pad(shard, dimension, max(sizes)).contiguous()
    stacked = source.new_empty((ranks.size, *source.shape))

    def finish() -> Tensor:
        if dimension == 0 and len(set(sizes)) == 1:
            return stacked.view(sum(sizes), *shard.shape[1:])
        parts = [stacked[rank].narrow(dimension, 0, size) for rank, size in enumerate(sizes)]
        return torch.cat(parts, dimension)

    return (
        lambda: _gather_into(stacked.view(-1), source.view(-1), group=ranks.group, async_op=True),
        finish,
    )


def reduce_scatter(ranks: RankGroup, tensor: Tensor, dimension: int, sizes: Sequence[int]) -> Begun:
    """See :meth:`Communicator.start_reduce_scatter`. Parts are padded to equal sizes."""
    pieces = tensor.to(ranks.sum_dtype(tensor.dtype)).split(list(sizes), dimension)
    source = torch.stack([pad(piece, dimension, max(sizes)) for piece in pieces])
    own = source.new_empty(source.shape[1:])
    return (
        lambda: _scatter_reduced(own.view(-1), source.view(-1), group=ranks.group, async_op=True),
        lambda: own.narrow(dimension, 0, sizes[ranks.rank]).contiguous().to(tensor.dtype),
    )


def reduce_scatter_by_gloo(ranks: RankGroup, tensor: Tensor, dimension: int, sizes: Sequence[int]) -> Begun:
    """:func:`reduce_scatter` of a tensor on the CPU: everybody's parts are exchanged, and added here.

    gloo's own reduces all of the tensor on every rank, which moves twice the bytes and more. The sum is in
    rank order; half precision is added in fp32 and rounded once.
    """
    pieces = tensor.split(list(sizes), dimension)
    source = in_a_row(tensor, dimension, sizes)
    given = [piece.numel() for piece in pieces]
    start, received = all_to_all(ranks, source, given, [given[ranks.rank]] * ranks.size)

    def finish() -> Tensor:
        return sum_in_order(received().view(ranks.size, *pieces[ranks.rank].shape).unbind())

    return start, finish


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one dtype, one after the other; half precision in fp32, rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total.add_(part)
    return total.to(dtype)


def all_to_all(ranks: RankGroup, source: Tensor, given: Sequence[int], taken: Sequence[int]) -> Begun:
    """Elements ``given`` to each rank, one after the other in ``source``, and ``taken`` from each alike."""
    received = source.new_empty(sum(taken))
    return (
        lambda: dist.all_to_all_single(
            received, source, list(taken), list(given), group=ranks.group, async_op=True
        ),
        lambda: received,
    )


def broadcast(ranks: RankGroup, tensor: Tensor, source: int, owned: bool) -> Begun:
    """See :meth:`Communicator.start_broadcast`."""
    if owned and tensor.is_contiguous():
        buffer = tensor
    else:
        buffer = tensor.clone(memory_format=torch.contiguous_format)
    root = ranks.global_ranks[source]
    return lambda: dist.broadcast(buffer, root, group=ranks.group, async_op=True), lambda: buffer


def reduce(ranks: RankGroup, tensor: Tensor, destination: int, owned: bool) -> Begun:
    """See :meth:`Communicator.start_reduce`."""
    buffer = _to_reduce(tensor, ranks.sum_dtype(tensor.dtype), owned)
    root = ranks.global_ranks[destination]
    return (
        lambda: dist.reduce(buffer, root, group=ranks.group, async_op=True),
        lambda: buffer.to(tensor.dtype),
    )


def _to_reduce(tensor: Tensor, dtype: torch.dtype, owned: bool) -> Tensor:
    """Memory that may be reduced in place."""
    if owned and tensor.is_contiguous() and dtype == tensor.dtype:
        return tensor
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
