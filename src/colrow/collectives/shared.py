"""The plain collectives in shared memory: what is read, what is written, and how the result comes of it.

Each function gives a blocking call, and a function that makes the result of what that has written. Inputs are
read where they are and results written to memory allocated here, so nothing is copied that need not be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from colrow.collectives.failure import diagnose
from colrow.collectives.pending import Pending
from colrow.collectives.shapes import in_a_row, joined
from colrow.collectives.statistics import Call, Tally
from colrow.transport import Memory
from colrow.transport.operands import plain

Plan: TypeAlias = tuple[Callable[[], None], Callable[[], Tensor]]


class Blocking:
    """A collective that runs while it is waited for."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    def wait(self) -> None:
        """Run it."""
        self._run()


class Reduction(Pending):
    """An all-reduce, the collective of every layer, with as little around it as there can be.

    Args:
        call, ranks: what it is, for errors.
        tally: gets the seconds that it takes.
        memory: of the ranks.
        tensor, reduction, owned: see :meth:`Communicator.start_all_reduce`.
    """

    def __init__(
        self,
        call: Call,
        ranks: Sequence[int],
        tally: Tally,
        memory: Memory,
        tensor: Tensor,
        reduction: str,
        owned: bool,
    ) -> None:
        self._call, self._ranks, self._tally = call, ranks, tally
        self._memory: Memory | None = memory
        self._source = source = plain(tensor)
        self._reduced = source if owned or source is not tensor else torch.empty_like(source)
        self._reduction = reduction

    def wait(self) -> Tensor:
        """The result. Blocks when called first.

        Raises:
            RankFailure: if another rank died, raised or did not come within the group's timeout.
        """
        if self._memory is not None:
            begin = time.perf_counter()  # read from this frame by current_position
            try:
                self._memory.all_reduce(self._source, self._reduced, self._reduction)
            except RuntimeError as error:
                raise diagnose(error, self._call, self._ranks) from error
            self._tally.seconds += time.perf_counter() - begin
            self._memory = None
            del self._source
        return self._reduced


def all_gather(memory: Memory, shard: Tensor, dimension: int, sizes: Sequence[int]) -> Plan:
    """See :meth:`Communicator.start_all_gather`."""
    source = plain(shard)
    shapes = [[*shard.shape[:dimension], size, *shard.shape[dimension + 1 :]] for size in sizes]
    counts = tuple(torch.Size(shape).numel() for shape in shapes)
    is_equal = len(set(counts)) == 1
    result = source.new_empty(sum(counts))

    return (
        lambda: memory.all_gather(source, result, None if is_equal else counts),
        lambda: joined(result, dimension, shapes),
    )


def reduce_scatter(memory: Memory, tensor: Tensor, dimension: int, sizes: Sequence[int]) -> Plan:
    """See :meth:`Communicator.start_reduce_scatter`."""
    source = in_a_row(plain(tensor), dimension, sizes)
    shape = list(tensor.shape)
    shape[dimension] = sizes[memory.rank]
    result = source.new_empty(shape)
    rest = tensor.numel() // sum(sizes) if sum(sizes) else 0
    counts = None if len(set(sizes)) == 1 else tuple(size * rest for size in sizes)
    return lambda: memory.reduce_scatter(source, result, counts), lambda: result


def all_to_all(memory: Memory, source: Tensor, given: Sequence[int], taken: Sequence[int]) -> Plan:
    """Elements ``given`` to each rank, one after the other in ``source``, and ``taken`` from each alike."""
    source = plain(source)
    received = source.new_empty(sum(taken))
    return lambda: memory.all_to_all(source, received, given, taken), lambda: received


def broadcast(memory: Memory, tensor: Tensor, source: int, owned: bool) -> Plan:
    """See :meth:`Communicator.start_broadcast`."""
    if owned and tensor.is_contiguous():
        buffer = tensor
    elif memory.rank == source:
        buffer = tensor.clone(memory_format=torch.contiguous_format)
    else:
        buffer = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    buffer = plain(buffer)
    return lambda: memory.broadcast(buffer, source), lambda: buffer


def reduce(memory: Memory, tensor: Tensor, destination: int) -> Plan:
    """See :meth:`Communicator.start_reduce`."""
    source = plain(tensor)
    result = torch.empty_like(source) if memory.rank == destination else source.new_empty(0)
    return (
        lambda: memory.reduce(source, result, destination),
        lambda: result if memory.rank == destination else source,
    )
