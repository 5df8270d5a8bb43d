"""Collectives between hosts, of one process on each, through gloo.

Each collective begins with a message of one size that says what it is: gloo ends a process whose message has
another size than expected, and may take a shorter one without a word. Small tensors travel with that message.
gloo sums large ones; else it only moves bytes, and torch reduces what arrives in the order of the hosts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, Store
from torch.distributed import AllreduceOptions, AllToAllOptions, BroadcastOptions, ProcessGroupGloo, ReduceOp

from colrow.transport.errors import TransportError
from colrow.transport.work import wait_for

MESSAGES_BYTES = 32 << 10
"""Size of the messages that begin a collective, of all hosts together."""
LEAST_MESSAGE_BYTES = 1024
CALL_BYTES = 64
"""What describes the call: the rest of the message is for a tensor that is small enough."""

_SUMMED_BY_GLOO = (torch.float32, torch.float64, torch.int32, torch.int64)
_UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}

Call = tuple[int, ...]
"""What a collective is, in whole numbers: equal on all hosts."""


def can_combine(dtype: torch.dtype, reduction: str) -> bool:
    """Whether :func:`combine` takes such tensors: torch does not order large unsigned numbers."""
    return reduction in _FUNCTIONS and not (dtype in _UNSIGNED and reduction in ("min", "max"))


def combine(parts: Sequence[Tensor], reduction: str, out: Tensor) -> None:
    """Reduce flat tensors in their order, elementwise, into ``out``, which may be any of the first two."""
    if out.dtype in _UNSIGNED:
        signed = _UNSIGNED[out.dtype]
        parts, out = [part.view(signed) for part in parts], out.view(signed)
    function = _FUNCTIONS[reduction]
    function(parts[0], parts[1], out=out)
    for part in parts[2:]:
        function(out, part, out=out)


class Across:
    """One process's end of a group with one process on each of several hosts.

    Tensors are flat, contiguous and on the CPU. After any failure the group is of no use.

    Args:
        store: where the processes find each other.
        host: number of this process's host.
        ranks: global ranks of the processes, in the order of the hosts.
        timeout: asked for the timeout of each collective in seconds.

    Raises:
        RuntimeError: if a process does not come.
    """

    def __init__(self, store: Store, host: int, ranks: Sequence[int], timeout: Callable[[], float]) -> None:
        self._host, self._ranks, self._timeout = host, tuple(ranks), timeout
        self._hosts = len(ranks)
        self._message_bytes = message_bytes(len(ranks))
        limit = timedelta(seconds=timeout())
        self._gloo: Any = ProcessGroupGloo(store, host, len(ranks), timeout=limit)

    def all_reduce(self, call: Call, tensor: Tensor, reduction: str) -> None:
        """Reduce in place."""
        told = self._meet(call, tensor)
        if told:
            combine([part.view(tensor.dtype) for part in told], reduction, tensor)
            return
        if reduction == "sum" and tensor.dtype in _SUMMED_BY_GLOO:
            options = AllreduceOptions()
            options.reduceOp, options.timeout = ReduceOp(ReduceOp.SUM), self._limit()
            wait_for(self._gloo.allreduce([tensor], options))
            return
        counts = even_parts(tensor.numel(), self._hosts)
        own = tensor.split(counts)[self._host]
        self._reduce_scatter(tensor, own, counts, reduction)
        self._all_gather(own, tensor, counts)

    def reduce_scatter(
        self, call: Call, source: Tensor, result: Tensor, counts: Sequence[int], reduction: str
    ) -> None:
        """This host's part of the reduction; ``counts``: elements of each host's part in ``source``."""
        told = self._meet(call, source)
        if told:
            parts = [part.view(source.dtype).split(list(counts))[self._host] for part in told]
            combine(parts, reduction, result)
            return
        self._reduce_scatter(source, result, counts, reduction)

    def all_gather(self, call: Call, source: Tensor, result: Tensor, counts: Sequence[int]) -> None:
        """All hosts' tensors, one after the other; ``counts``: elements of each."""
        width = source.element_size()
        told = self._meet(call, source, max(counts) * width)
        if not told:
            self._all_gather(source, result, counts)
            return
        for part, piece, count in zip(told, result.split(list(counts)), counts, strict=True):
            piece.copy_(part[: count * width].view(source.dtype))

    def broadcast(self, call: Call, tensor: Tensor, host: int) -> None:
        """Fill ``tensor`` with that of a host, which waits for nobody."""
        size = tensor.numel() * tensor.element_size()
        is_small = size <= self._message_bytes - CALL_BYTES
        message = self._message(call, tensor if is_small else None)
        own = message[:CALL_BYTES].clone()
        wait_for(self._broadcast(message, host))
        if not torch.equal(own, message[:CALL_BYTES]):
            raise self._mismatch(own, message[:CALL_BYTES], host)
        if not is_small:
            wait_for(self._broadcast(tensor, host))
        elif self._host != host:
            _bytes(tensor).copy_(message[CALL_BYTES:][:size])

    def barrier(self, call: Call) -> None:
        """Return once every process has called this."""
        self._meet(call, torch.empty(0))

    def close(self) -> None:
        """Leave, with no collective under way: those that wait for this process notice at once."""
        self._gloo = None

    def _meet(self, call: Call, tensor: Tensor, largest: int | None = None) -> list[Tensor]:
        """Compare the calls of all hosts; their tensors as bytes, if all are small.

        ``largest``: bytes of the largest tensor, if they differ.
        """
        size = tensor.numel() * tensor.element_size()
        is_small = (size if largest is None else largest) <= self._message_bytes - CALL_BYTES
        mine = self._message(call, tensor if is_small else None)
        theirs = mine.new_empty(self._hosts * self._message_bytes)
        options = AllgatherOptions()
        options.timeout = self._limit()
        wait_for(self._gloo._allgather_base(theirs, mine, options))
        messages = theirs.view(self._hosts, -1)
        for host, message in enumerate(messages):
            if not torch.equal(message[:CALL_BYTES], mine[:CALL_BYTES]):
                raise self._mismatch(mine[:CALL_BYTES], message[:CALL_BYTES], host)
        # copied out of the message: parts start at multiples of their elements
        return [message[CALL_BYTES:][: largest or size].clone() for message in messages] if is_small else []

    def _message(self, call: Call, tensor: Tensor | None) -> Tensor:
        message = torch.zeros(self._message_bytes, dtype=torch.uint8)
        message[:CALL_BYTES].view(torch.int64)[: len(call)] = torch.tensor(call, dtype=torch.int64)
        if tensor is not None:
            message[CALL_BYTES:][: tensor.numel() * tensor.element_size()] = _bytes(tensor)
        return message

    def _mismatch(self, mine: Tensor, theirs: Tensor, host: int) -> TransportError:
        from colrow.transport.group import describe_call

        here, there = (describe_call(*call.clone().view(torch.int64)[:4].tolist()) for call in (mine, theirs))
        if here == there:
            there += ", divided differently over the ranks"
        ranks = self._ranks
        message = f"rank {ranks[self._host]} is in {here}, rank {ranks[host]} on another host in {there}"
        return TransportError(message, is_mismatch=True)

    def _reduce_scatter(self, source: Tensor, result: Tensor, counts: Sequence[int], reduction: str) -> None:
        """``result`` may be this host's part of ``source``."""
        width, own = source.element_size(), counts[self._host]
        options = AllToAllOptions()
        options.timeout = self._limit()
        received = source.new_empty(own * self._hosts)
        work = self._gloo.alltoall_base(
            _bytes(received),
            _bytes(source),
            [own * width] * self._hosts,
            [count * width for count in counts],
            options,
        )
        wait_for(work)
        combine(received.split([own] * self._hosts), reduction, result)

    def _all_gather(self, source: Tensor, result: Tensor, counts: Sequence[int]) -> None:
        """``source`` may be its place in ``result``."""
        if len(set(counts)) == 1:
            options = AllgatherOptions()
            options.timeout = self._limit()
            wait_for(self._gloo._allgather_base(_bytes(result), _bytes(source), options))
            return
        parts = result.split(list(counts))
        if parts[self._host].data_ptr() != source.data_ptr():
            parts[self._host].copy_(source)
        works = [self._broadcast(part, host) for host, part in enumerate(parts) if part.numel()]
        for work in works:
            wait_for(work)

    def _broadcast(self, tensor: Tensor, host: int) -> Any:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = host, 0, self._limit()
        return self._gloo.broadcast([_bytes(tensor)], options)

    def _limit(self) -> timedelta:
        if self._gloo is None:
            raise TransportError("this rank has left the group")
        return timedelta(seconds=self._timeout())


def message_bytes(hosts: int) -> int:
    """Size of the message that begins a collective."""
    return max(LEAST_MESSAGE_BYTES, MESSAGES_BYTES // hosts // 1024 * 1024)


def even_parts(count: int, parts: int) -> list[int]:
    """Sizes of ``parts`` parts of ``count`` elements that are as equal as they can be."""
    borders = [count * number // parts for number in range(parts + 1)]
    return [end - begin for begin, end in itertools.pairwise(borders)]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
