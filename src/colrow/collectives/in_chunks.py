"""An all-reduce of something that is computed in chunks, each reduced while the next one is computed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

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
    if not ranks.overlaps or not _is_worth_it(x, written):
        return ranks.start_all_reduce(compute(x), label=label, owned=True).wait()
    rows = x.flatten(0, -2)
    result = x.new_empty(rows.shape[0], written)
    ranks.all_reduce_chunks(map(compute, rows.chunk(CHUNKS)), result, label=label)
    return result.view(*x.shape[:-1], written)


def _is_worth_it(x: Tensor, written: int) -> bool:
    rows = x.shape[:-1].numel()  # the same on all ranks, of which some may read no features
    return x.is_cpu and rows >= LEAST_ROWS and rows * written * x.element_size() >= LEAST_BYTES
