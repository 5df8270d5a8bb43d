"""Sums over the ranks of something that is computed in parts, each sent while the next one is computed.

The idea is that of the "matmul-scatter" rings of Wang et al. 2023, "Overlap Communication with Dependent
Computation via Decomposition in Large Deep Learning Models".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from colrow.collectives import through_torch
from colrow.collectives.communicator import Communicator

CHUNKS = 4
LEAST_BYTES = 1 << 20
"""Of the sum: less is over before the next chunk is."""
LEAST_ROWS = 256
"""Of the sum: products of fewer rows than a chunk then has take longer for each."""


def all_reduce_of(
    ranks: Communicator, x: Tensor, written: int, compute: Callable[[Tensor], Tensor], label: str
) -> Tensor:
    """The sum over the ranks of ``compute(x)``, [..., read] -> [..., written].

    In one piece, unless reductions wait for a network (:attr:`Communicator.overlaps`) and there is enough to
    do meanwhile. One collective in the statistics in any case; the same bits on every rank.

    Args:
        x: what this rank multiplies; of one shape but for its last dimension on all ranks.
        written: features that ``compute`` makes, in the dtype of ``x``, of each row of ``x`` alone.
        label: names the collective in errors and statistics.

    Raises:
        RankFailure: if another rank died, raised or did not come within the group's timeout.
    """
    if not _is_worth_it(ranks, x, written):
        return ranks.start_all_reduce(compute(x), label=label, owned=True).wait()
    rows = x.flatten(0, -2)
    result = x.new_empty(rows.shape[0], written)
    call = ranks.record("all_reduce", label, result.numel() * result.element_size())
    begun = [
        ranks.begin_call(call, *through_torch.all_reduce(ranks, compute(part), "sum", owned=True))
        for part in rows.chunk(CHUNKS)
    ]
    first = 0
    for pending in begun:
        total = pending.wait()
        result[first : first + len(total)] = total
        first += len(total)
    return result.view(*x.shape[:-1], written)


def reduce_scatter_of(
    ranks: Communicator,
    x: Tensor,
    written: int,
    compute: Callable[[Tensor], Tensor],
    dimension: int,
    sizes: Sequence[int],
    label: str,
) -> Tensor:
    """This rank's part, along ``dimension``, of the sum over the ranks of ``compute(x)``.

    Where :func:`all_reduce_of` works in chunks, what is for the next rank is computed first and sent, then
    what is for the one after it, and this rank's own at last. The sum is in rank order; half precision is
    added in fp32 and rounded once. One collective in the statistics in any case.

    Args:
        x, written, compute, label: as of :func:`all_reduce_of`.
        dimension: not the last one.
        sizes: extent of ``dimension`` on each rank.

    Raises:
        RankFailure: if another rank died, raised or did not come within the group's timeout.
    """
    if not _is_worth_it(ranks, x, written) or min(sizes) == 0:
        return ranks.start_reduce_scatter(compute(x), dimension, sizes, label=label).wait()
    rank, size = ranks.rank, ranks.size
    pieces = x.split(list(sizes), dimension)
    shape = (*pieces[rank].shape[:-1], written)
    call = ranks.record("reduce_scatter", label, x.shape[:-1].numel() * written * x.element_size())
    begun = {}
    for step in range(1, size):
        target, source = (rank + step) % size, (rank - step) % size
        part = compute(pieces[target]).contiguous().view(-1)
        given, taken = [0] * size, [0] * size
        given[target], taken[source] = part.numel(), torch.Size(shape).numel()
        begun[source] = ranks.begin_call(call, *through_torch.all_to_all(ranks, part, given, taken))
    own = compute(pieces[rank])
    parts = [own if one == rank else begun[one].wait().view(shape) for one in range(size)]
    return through_torch.sum_in_order(parts)


def _is_worth_it(ranks: Communicator, x: Tensor, written: int) -> bool:
    if not ranks.overlaps:
        return False
    rows = x.shape[:-1].numel()  # the same on all ranks, of which some may read no features
    return x.is_cpu and rows >= LEAST_ROWS and rows * written * x.element_size() >= LEAST_BYTES
