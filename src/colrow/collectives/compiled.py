"""The plain collectives as operators that ``torch.compile`` can put into a graph.

In eager mode colrow calls ``torch.distributed`` itself, which takes a sixth of the host time. A compiled
graph needs operators that write into nothing of the caller's: these allocate their results. They know the
process group by its name, so that a graph holds nothing of a communicator: what a graph moves is not counted
in :func:`colrow.comm_stats`, and a dead or late rank shows as the transport's own ``RuntimeError``, within
the same timeout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from colrow.collectives.shapes import check_dimension, exchanged_shapes, gathered_sizes, pad, scattered_sizes

if TYPE_CHECKING:
    from colrow.collectives.communicator import Communicator


def all_reduce(ranks: Communicator, x: Tensor, reduction: str = "sum") -> Tensor:
    """As :meth:`Communicator.all_reduce`; ``x`` itself if there is one rank."""
    if ranks.size == 1:
        return x
    dtype = ranks.sum_dtype(x.dtype) if reduction == "sum" else x.dtype
    operand = x.to(dtype).contiguous()
    result = _wait(torch.ops._c10d_functional.all_reduce(operand, reduction, ranks.name))
    return result.to(x.dtype)


def all_gather(ranks: Communicator, shard: Tensor, dimension: int, sizes: Sequence[int] | None) -> Tensor:
    """As :meth:`Communicator.all_gather`; ``shard`` itself if there is one rank."""
    if ranks.size == 1:
        return shard
    dimension = check_dimension(dimension, shard)
    sizes = gathered_sizes(shard, dimension, sizes, ranks.rank, ranks.size)
    source = pad(shard, dimension, max(sizes)).contiguous().unsqueeze(0)
    stacked = _wait(torch.ops._c10d_functional.all_gather_into_tensor(source, ranks.size, ranks.name))
    parts = [stacked[rank].narrow(dimension, 0, size) for rank, size in enumerate(sizes)]
    return torch.cat(parts, dimension)


def reduce_scatter(
    ranks: Communicator, tensor: Tensor, dimension: int, sizes: Sequence[int] | None
) -> Tensor:
    """As :meth:`Communicator.reduce_scatter`; ``tensor`` itself if there is one rank."""
    if ranks.size == 1:
        return tensor
    dimension = check_dimension(dimension, tensor)
    sizes = scattered_sizes(tensor, dimension, sizes, ranks.size)
    pieces = tensor.to(ranks.sum_dtype(tensor.dtype)).split(list(sizes), dimension)
    source = torch.stack([pad(piece, dimension, max(sizes)) for piece in pieces])
    own = _wait(torch.ops._c10d_functional.reduce_scatter_tensor(source, "sum", ranks.size, ranks.name))
    return own[0].narrow(dimension, 0, sizes[ranks.rank]).contiguous().to(tensor.dtype)


def all_to_all(
    ranks: Communicator,
    tensor: Tensor,
    split_dimension: int,
    split_sizes: Sequence[int],
    concat_dimension: int,
    concat_sizes: Sequence[int],
) -> Tensor:
    """As :meth:`Communicator.start_all_to_all`; ``tensor`` itself if there is one rank."""
    if ranks.size == 1:
        return tensor
    split_dimension = check_dimension(split_dimension, tensor)
    concat_dimension = check_dimension(concat_dimension, tensor)
    shapes = exchanged_shapes(
        tensor, split_dimension, split_sizes, concat_dimension, concat_sizes, ranks.rank, ranks.size
    )
    pieces = [piece.reshape(-1) for piece in tensor.split(list(split_sizes), split_dimension)]
    given, taken = [piece.shape[0] for piece in pieces], [torch.Size(shape).numel() for shape in shapes]
    received = _wait(
        torch.ops._c10d_functional.all_to_all_single(torch.cat(pieces), taken, given, ranks.name)
    )
    parts = [part.view(shape) for part, shape in zip(received.split(taken), shapes, strict=True)]
    return torch.cat(parts, concat_dimension)


def exchange(ranks: Communicator, tensor: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
    """As :meth:`Communicator.start_exchange`; ``tensor`` itself if there is one rank."""
    if ranks.size == 1:
        return tensor
    operator = torch.ops._c10d_functional.all_to_all_single
    return _wait(operator(tensor.contiguous(), list(taken), list(given), ranks.name))


def _wait(under_way: Tensor) -> Tensor:
    return cast(Tensor, torch.ops._c10d_functional.wait_tensor(under_way))
