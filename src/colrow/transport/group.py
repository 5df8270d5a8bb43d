"""Collectives in memory that the ranks of a group share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from colrow.transport.agreement import Agreement
from colrow.transport.errors import TransportError

if TYPE_CHECKING:
    from colrow.transport import _native

DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int16: 6,
    torch.uint16: 7,
    torch.int32: 8,
    torch.uint32: 9,
    torch.int64: 10,
    torch.uint64: 11,
    torch.bool: 12,
}
"""What can be reduced, by the native code's number."""
_MOVED = (
    "complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
NUMBERS = DTYPES | {
    getattr(torch, name): number
    for number, name in enumerate(_MOVED.split(), len(DTYPES))
    if hasattr(torch, name)
}
"""What the ranks' calls are compared by: of tensors that can only be moved, too."""
OTHER = 63
"""The number of all further dtypes."""
REDUCTIONS = {"sum": 0, "product": 1, "min": 2, "max": 3, "avg": 4, "band": 5, "bor": 6, "bxor": 7}
OPERATIONS = ("barrier", "all_reduce", "reduce_scatter", "all_gather", "all_to_all")
ONE_SHOT_BYTES = 128 << 10
"""Tensors that are at most this together are summed by every rank: one synchronisation, not two."""

(
    DONE,
    TIMED_OUT,
    DIED,
    LEFT,
    MISMATCH,
    INTERRUPTED,
    CLOSED,
    FORKED,
    REFUSED,
    NESTED,
) = range(10)


class SharedGroup:
    """One rank's end of a group that shares memory.

    Tensors are contiguous and on the CPU; each call is collective, and blocks until this rank's result is
    there. Nothing is allocated. After any failure the group is of no use: every call fails at once.

    Args:
        agreement: with an arena, from :func:`colrow.transport.agreement.agree`.
        rank: this process's rank in the group.
        global_ranks: the members' job-wide ranks, for messages.
        timeout: asked for the timeout in seconds while a call waits.

    Attributes:
        bytes: size of the shared memory.
    """

    def __init__(
        self, agreement: Agreement, rank: int, global_ranks: Sequence[int], timeout: Callable[[], float]
    ) -> None:
        from colrow.transport import _native

        assert agreement.arena is not None
        arena, waiting = agreement.arena, agreement.waiting
        self.rank = rank
        self.size = len(global_ranks)
        self.global_ranks = tuple(global_ranks)
        self.bytes = arena.bytes
        self._native: _native.Group = _native.Group(
            arena.file,
            rank,
            self.size,
            arena.chunk,
            arena.slots,
            ONE_SHOT_BYTES // self.size,
            waiting.spin,
            waiting.give_way,
            timeout,
        )

    @staticmethod
    def can_reduce(dtype: torch.dtype, reduction: str) -> bool:
        """Whether the reductions take such tensors."""
        if dtype.is_complex:
            return reduction in ("sum", "avg") and dtype is not torch.complex32
        if dtype not in DTYPES or reduction not in REDUCTIONS:
            return False
        is_whole = not dtype.is_floating_point
        return reduction != "avg" if is_whole else not reduction.startswith("b")

    def all_reduce(self, source: Tensor, result: Tensor, reduction: str = "sum") -> None:
        """Elementwise reduction over the ranks; ``result`` may be ``source``."""
        if source.dtype.is_complex:
            source, result = torch.view_as_real(source), torch.view_as_real(result)
        outcome = self._native.all_reduce(
            source.data_ptr(), result.data_ptr(), source.numel(), DTYPES[source.dtype], REDUCTIONS[reduction]
        )
        if outcome:
            self._raise(outcome)

    def reduce_scatter(
        self,
        source: Tensor,
        result: Tensor,
        counts: tuple[int, ...] | None = None,
        reduction: str = "sum",
    ) -> None:
        """This rank's part of the reduction of ``source``.

        ``counts``: elements of each rank's part, one after the other in ``source``; equal if ``None``.
        """
        factor = 1
        if source.dtype.is_complex:
            source, result, factor = torch.view_as_real(source), torch.view_as_real(result), 2
        outcome = self._native.reduce_scatter(
            source.data_ptr(),
            result.data_ptr(),
            result.numel() if counts is None else tuple(count * factor for count in counts),
            DTYPES[source.dtype],
            REDUCTIONS[reduction],
        )
        if outcome:
            self._raise(outcome)

    def all_gather(self, source: Tensor, result: Tensor, counts: tuple[int, ...] | None = None) -> None:
        """All ranks' tensors, one after the other in ``result``.

        ``counts``: elements of each rank's; equal if ``None``. ``source`` may be its place in ``result``.
        """
        width = source.element_size()
        size = source.numel() * width if counts is None else tuple(count * width for count in counts)
        dtype = NUMBERS.get(source.dtype, OTHER)
        outcome = self._native.all_gather(source.data_ptr(), result.data_ptr(), size, dtype)
        if outcome:
            self._raise(outcome)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fill ``tensor`` with that of the rank ``source``."""
        counts = [0] * self.size
        counts[source] = tensor.numel() * tensor.element_size()
        address = tensor.data_ptr()
        dtype = NUMBERS.get(tensor.dtype, OTHER)
        outcome = self._native.all_gather(address, address, tuple(counts), dtype)
        if outcome:
            self._raise(outcome)

    def reduce(self, source: Tensor, result: Tensor, destination: int, reduction: str = "sum") -> None:
        """The reduction, into ``result`` of rank ``destination``; not in place; others' ``result`` stays."""
        counts = [0] * self.size
        counts[destination] = source.numel()
        self.reduce_scatter(source, result, tuple(counts), reduction)

    def all_to_all(
        self,
        source: Tensor,
        result: Tensor,
        given: Sequence[int] | None = None,
        taken: Sequence[int] | None = None,
    ) -> None:
        """Parts of ``source`` to each rank, and of each rank into ``result``; both in rank order.

        ``given``, ``taken``: elements of each part; equal if ``None``.
        """
        width = source.element_size()
        outcome = self._native.all_to_all(
            source.data_ptr(),
            result.data_ptr(),
            _part_bytes(source, given, self.size, width),
            _part_bytes(result, taken, self.size, width),
            NUMBERS.get(source.dtype, OTHER),
        )
        if outcome:
            self._raise(outcome)

    def barrier(self) -> None:
        """Return once every rank has called this."""
        outcome = self._native.barrier()
        if outcome:
            self._raise(outcome)

    def counters(self) -> dict[str, int]:
        """How many waits were over while this rank spun, yielded and slept."""
        return self._native.counters()

    def close(self) -> None:
        """Leave; the others notice if they wait for this rank. The last one's leaving frees the memory."""
        self._native.close()

    def _raise(self, outcome: int) -> NoReturn:
        if outcome == NESTED:
            raise ValueError(
                "a signal handler has called a collective of the group in which this thread waits: raise an "
                "exception there, or set a flag that the program looks at between collectives"
            )
        if outcome == FORKED:
            raise ValueError(
                "this process was forked from a rank, whose shared memory it does not have: start processes "
                "that communicate with multiprocessing's spawn or forkserver method"
            )
        if outcome == REFUSED:
            raise ValueError("the ranks cannot do this in shared memory: the arguments do not fit together")
        outcome, rank, finder, calls = self._native.problem()
        if outcome == CLOSED and rank == self.rank:
            raise TransportError("this rank has left the group")
        who = self.global_ranks[rank] if rank >= 0 else -1
        if outcome == MISMATCH:
            raise TransportError(self._describe_mismatch(who, calls), is_mismatch=True)
        texts = {
            TIMED_OUT: "did not come in time",
            DIED: "has died",
            LEFT: "has left the group",
            CLOSED: "has left the group",
            INTERRUPTED: "was interrupted",
        }
        seen = "" if finder == self.rank else f", says rank {self.global_ranks[finder]}"
        ranks = () if outcome == INTERRUPTED else (who,)
        raise TransportError(f"rank {who} {texts[outcome]}{seen}", ranks)

    def _describe_mismatch(
        self, other: int, calls: tuple[tuple[int, int, int, int], tuple[int, int, int, int]] | None
    ) -> str:
        if calls is None:
            return f"the ranks, rank {other} among them, are in different calls"
        mine, theirs = (describe_call(*call) for call in calls)
        if mine == theirs:
            theirs += ", divided differently over the ranks"
        return f"rank {self.global_ranks[self.rank]} is in {mine}, rank {other} in {theirs}"


def _part_bytes(
    tensor: Tensor, counts: Sequence[int] | None, ranks: int, width: int
) -> int | tuple[int, ...]:
    if counts is None:
        return tensor.numel() // ranks * width
    return tuple(count * width for count in counts)


def describe_call(operation: int, dtype: int, reduction: int, count: int) -> str:
    """A call as errors name it, from its numbers."""
    name = OPERATIONS[operation]
    known = next((one for one, number in NUMBERS.items() if number == dtype), "another dtype")
    kind = str(known).removeprefix("torch.")
    if name in ("all_reduce", "reduce_scatter"):
        return f"{name} ({list(REDUCTIONS)[reduction]}) of {count} {kind}"
    if name == "all_to_all":
        return f"{name}, {count} bytes from one to the other" if count else f"{name} of {kind}"
    return f"{name} of {count} bytes of {kind}" if name == "all_gather" else name
