"""Collectives of ranks on several hosts: in shared memory on each host, through gloo between the hosts.

Of each host the first ranks, as many as the smallest host has, are *carriers*. Carrier j of every host is in
one group with carrier j of the others, and works between the hosts on its slice of the data. So a tensor
crosses between two hosts once, however many ranks these have.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from colrow.transport.across import Across, Call, can_combine, even_parts
from colrow.transport.errors import TransportError
from colrow.transport.group import NUMBERS, OPERATIONS, OTHER, REDUCTIONS, SharedGroup, describe_call
from colrow.transport.work import wait_for

MOST_CARRIERS = 4
"""Of each host: more streams between two hosts are hardly faster."""
SLICE_BYTES = 4 << 20
"""Tensors have a carrier for each so many bytes: for less a further one is not worth its messages."""
_HALF = (torch.bfloat16, torch.float16)


class HierarchicalGroup:
    """One rank's end of a group whose ranks are on several hosts.

    The methods are those of :class:`SharedGroup`, with one difference: sums are in the order of the hosts,
    and on each host in that of its ranks. All ranks get the same bits, in every run the same.

    Args:
        inside: with the other ranks of this host; ``None`` if there are none.
        make_across: gives this rank's end of the group of carriers of a number.
        whole: gloo among all ranks, for what is not done here.
        rank: this process's rank in the group.
        global_ranks: the members' job-wide ranks.
        hosts: ranks of the group on each host.
    """

    def __init__(
        self,
        inside: SharedGroup | None,
        make_across: Callable[[int], Across],
        whole: Any,
        rank: int,
        global_ranks: Sequence[int],
        hosts: Sequence[Sequence[int]],
    ) -> None:
        self.rank = rank
        self.size = len(global_ranks)
        self.global_ranks = tuple(global_ranks)
        self.hosts = tuple(tuple(host) for host in hosts)
        self._inside, self._whole = inside, whole
        self._host = next(number for number, host in enumerate(hosts) if rank in host)
        self._local = self.hosts[self._host].index(rank)
        self._carriers = min(MOST_CARRIERS, *(len(host) for host in hosts))
        self._across = make_across(self._local) if self._local < self._carriers else None
        self._turn = threading.RLock()
        self._problem = ""
        self._calls = 0

    @staticmethod
    def can_reduce(dtype: torch.dtype, reduction: str) -> bool:
        """Whether the reductions take such tensors."""
        inner = "sum" if reduction == "avg" else reduction
        return SharedGroup.can_reduce(dtype, reduction) and (dtype.is_complex or can_combine(dtype, inner))

    def all_reduce(self, source: Tensor, result: Tensor, reduction: str = "sum") -> None:
        """Elementwise reduction over the ranks; ``result`` may be ``source``."""
        given, taken, inner = _operands(source, result, reduction)
        counts = self._slices(given)
        with self._call("all_reduce", given, inner, given.numel()) as call:
            piece = self._reduce_inside(given, counts, inner)
            if self._across is not None and self._carries(counts):
                self._across.all_reduce(call, piece, inner)
                self._divide(piece, reduction)
            self._gather_inside(piece, taken, counts)
        _give(taken, result)

    def reduce_scatter(
        self,
        source: Tensor,
        result: Tensor,
        counts: tuple[int, ...] | None = None,
        reduction: str = "sum",
    ) -> None:
        """This rank's part of the reduction of ``source``; see :meth:`SharedGroup.reduce_scatter`."""
        given, taken, inner = _operands(source, result, reduction)
        factor = 2 if source.dtype.is_complex else 1
        sizes = [taken.numel()] * self.size if counts is None else [count * factor for count in counts]
        carriers = self._carriers_for(given)
        order, sections = self._sections(carriers)
        with self._call("reduce_scatter", given, inner, given.numel(), sizes) as call:
            parts = given.split(sizes)
            ordered = _joined([parts[rank] for rank in order], given)
            amounts = [sum(sizes[rank] for host in section for rank in host) for section in sections]
            piece = self._reduce_inside(ordered, amounts, inner)
            block = piece
            if self._across is not None and self._carries(amounts):
                hosts = [sum(sizes[rank] for rank in host) for host in sections[self._local]]
                block = piece.new_empty(hosts[self._host])
                self._across.reduce_scatter(call, piece, block, hosts, inner)
                self._divide(block, reduction)
            self._hand_out(block, taken, sizes, carriers)
        _give(taken, result)

    def all_gather(self, source: Tensor, result: Tensor, counts: tuple[int, ...] | None = None) -> None:
        """All ranks' tensors, one after the other in ``result``; see :meth:`SharedGroup.all_gather`."""
        given, taken = source.reshape(-1), result.view(-1)
        sizes = [given.numel()] * self.size if counts is None else list(counts)
        carriers = self._carriers_for(taken)
        order, sections = self._sections(carriers)
        with self._call("all_gather", given, "", sum(sizes), sizes) as call:
            block = self._collect(given, sizes, carriers)
            section = block
            amounts = [sum(sizes[rank] for host in one for rank in host) for one in sections]
            if self._across is not None and self._carries(amounts):
                hosts = [sum(sizes[rank] for rank in host) for host in sections[self._local]]
                section = given.new_empty(sum(hosts))
                self._across.all_gather(call, block, section, hosts)
            is_in_order = order == list(range(self.size))
            gathered = taken if is_in_order else torch.empty_like(taken)
            self._gather_inside(section, gathered, amounts)
            if not is_in_order:
                parts = taken.split(sizes)
                for rank, piece in zip(order, gathered.split([sizes[rank] for rank in order]), strict=True):
                    parts[rank].copy_(piece)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fill ``tensor`` with that of the rank ``source``."""
        root = next(number for number, host in enumerate(self.hosts) if source in host)
        flat = tensor.view(-1)
        counts = self._slices(flat)
        with self._call("broadcast", flat, "", flat.numel(), [source]) as call:
            if self._host == root and self._inside is not None:
                self._inside.broadcast(flat, self.hosts[root].index(source))
            if self._across is not None and self._carries(counts):
                piece = flat.split(counts)[self._local]
                self._across.broadcast(call, piece, root)
            if self._host != root:
                start = sum(counts[: self._local])
                self._gather_inside(flat[start : start + self._own(counts)], flat, counts)

    def reduce(self, source: Tensor, result: Tensor, destination: int, reduction: str = "sum") -> None:
        """The reduction, into ``result`` of rank ``destination``; not in place; others' ``result`` stays."""
        counts = [0] * self.size
        counts[destination] = source.numel()
        taken = result if self.rank == destination else source.new_empty(0)
        self.reduce_scatter(source, taken, tuple(counts), reduction)

    def all_to_all(
        self,
        source: Tensor,
        result: Tensor,
        given: Sequence[int] | None = None,
        taken: Sequence[int] | None = None,
    ) -> None:
        """Parts of ``source`` to each rank, through gloo; see :meth:`SharedGroup.all_to_all`."""
        with self._call("all_to_all", source, "", 0):
            width = source.element_size()
            taken_bytes = [count * width for count in taken or even_parts(result.numel(), self.size)]
            given_bytes = [count * width for count in given or even_parts(source.numel(), self.size)]
            self._compare_parts(source.dtype, given_bytes, taken_bytes)
            work = self._whole.alltoall_base(
                result.reshape(-1).view(torch.uint8),
                source.reshape(-1).view(torch.uint8),
                taken_bytes,
                given_bytes,
            )
            wait_for(work)

    def _compare_parts(self, dtype: torch.dtype, given: Sequence[int], taken: Sequence[int]) -> None:
        """All ranks see whether all fit: gloo would take a shorter part without a word.

        Raises:
            TransportError: if dtypes differ, or a rank takes other than what one gives it, in bytes.
        """
        own = torch.tensor([NUMBERS.get(dtype, OTHER), *given, *taken])
        told = own.new_empty(self.size * own.numel())
        self.all_gather(own, told)
        numbers, gives, takes = told.view(self.size, -1).split([1, self.size, self.size], 1)
        ranks = self.global_ranks
        calls = [
            describe_call(OPERATIONS.index("all_to_all"), number, 0, 0) for number in numbers[:, 0].tolist()
        ]
        other = next((rank for rank, call in enumerate(calls) if call != calls[0]), 0)
        if other:
            raise TransportError(
                f"rank {ranks[0]} is in {calls[0]}, rank {ranks[other]} in {calls[other]}", is_mismatch=True
            )
        for giver, taker in (gives != takes.t()).nonzero().tolist():
            raise TransportError(
                f"all_to_all: rank {ranks[giver]} gives rank {ranks[taker]} {gives[giver, taker]} bytes, "
                f"which takes {takes[taker, giver]}",
                is_mismatch=True,
            )

    def barrier(self) -> None:
        """Return once every rank has called this."""
        with self._call("barrier", torch.empty(0), "", 0) as call:
            if self._inside is not None:
                self._inside.barrier()
            if self._across is not None:
                self._across.barrier(call)
            if self._inside is not None:
                self._inside.barrier()

    def counters(self) -> dict[str, int]:
        """See :meth:`SharedGroup.counters`."""
        return self._inside.counters() if self._inside is not None else {}

    def close(self) -> None:
        """Leave; the others notice if they wait for this rank."""
        self._problem = self._problem or "this rank has left the group"
        if self._inside is not None:
            self._inside.close()
        if self._turn.acquire(blocking=False):  # else a collective is under way, and ends because of this
            self._release_across()
            self._turn.release()

    @contextmanager
    def _call(
        self, operation: str, tensor: Tensor, reduction: str, count: int, cut: Sequence[int] = ()
    ) -> Iterator[Call]:
        """A collective, described in numbers that are the same on all ranks. If it fails, leave the group."""
        with self._turn:
            if self._problem:
                raise TransportError(self._problem)
            self._calls += 1
            name = operation if operation in OPERATIONS else "all_gather"
            dtype = NUMBERS.get(tensor.dtype, OTHER)
            number = REDUCTIONS[reduction] if reduction else 0
            amount = count if reduction else count * tensor.element_size()
            checksum = zlib.crc32(repr((operation, list(cut))).encode())
            try:
                yield OPERATIONS.index(name), dtype, number, amount, checksum, self._calls
            except ValueError:  # refused before anything was done, or in a process that was forked
                raise
            except BaseException as error:
                # those who wait for this rank, here and on other hosts, learn it from closed connections
                self._problem = self._problem or f"a collective has failed before: {error}"
                if self._inside is not None:
                    self._inside.close()
                if isinstance(error, Exception):  # else gloo would keep an interrupted rank until the timeout
                    self._release_across()
                if isinstance(error, RuntimeError) and not isinstance(error, TransportError):
                    raise TransportError(f"between hosts: {error}") from error
                raise

    def _release_across(self) -> None:
        if self._across is not None:
            self._across.close()
        self._whole = None

    def _carriers_for(self, tensor: Tensor) -> int:
        """How many carriers of each host work on a tensor; the same on all ranks."""
        return min(self._carriers, 1 + tensor.numel() * tensor.element_size() // SLICE_BYTES)

    def _slices(self, tensor: Tensor) -> list[int]:
        """Elements that each rank of this host works on: some for carriers, none for the others."""
        return self._padded(even_parts(tensor.numel(), self._carriers_for(tensor)))

    def _padded(self, counts: Sequence[int]) -> list[int]:
        return [*counts, *[0] * (len(self.hosts[self._host]) - len(counts))]

    def _carries(self, counts: Sequence[int]) -> bool:
        """Whether this carrier has something to do; the first one compares the calls in any case."""
        return self._local == 0 or self._own(counts) > 0

    def _own(self, counts: Sequence[int]) -> int:
        return counts[self._local] if self._local < len(counts) else 0

    def _sections(self, carriers: int) -> tuple[list[int], list[list[tuple[int, ...]]]]:
        """For each carrier the ranks on each host that it works for; all of them, in this order."""
        sections = [[host[number::carriers] for host in self.hosts] for number in range(carriers)]
        return [rank for section in sections for host in section for rank in host], sections

    def _divide(self, tensor: Tensor, reduction: str) -> None:
        if reduction == "avg":
            tensor /= self.size

    def _reduce_inside(self, tensor: Tensor, counts: Sequence[int], reduction: str) -> Tensor:
        """Of the sum over this host the elements that this rank works on, in memory of its own."""
        if self._inside is None:
            return tensor.clone()
        piece = tensor.new_empty(self._own(counts))
        self._inside.reduce_scatter(tensor, piece, tuple(self._padded(counts)), reduction)
        return piece

    def _gather_inside(self, piece: Tensor, result: Tensor, counts: Sequence[int]) -> None:
        if self._inside is not None:
            self._inside.all_gather(piece, result, tuple(self._padded(counts)))
        elif piece.data_ptr() != result.data_ptr():
            result.copy_(piece)

    def _hand_out(self, block: Tensor, result: Tensor, sizes: Sequence[int], carriers: int) -> None:
        """From each carrier to the ranks of this host that it has worked for."""
        host = self.hosts[self._host]
        if self._inside is None or len(host) == carriers:
            result.copy_(block)
            return
        given = [self._amount(sizes, self._local, rank, carriers) for rank in range(len(host))]
        taken = [self._amount(sizes, rank, self._local, carriers) for rank in range(len(host))]
        self._inside.all_to_all(block, result, given, taken)

    def _collect(self, part: Tensor, sizes: Sequence[int], carriers: int) -> Tensor:
        """From each rank of this host to the carrier that works for it."""
        host = self.hosts[self._host]
        if self._inside is None or len(host) == carriers:
            return part
        given = [self._amount(sizes, rank, self._local, carriers) for rank in range(len(host))]
        taken = [self._amount(sizes, self._local, rank, carriers) for rank in range(len(host))]
        block = part.new_empty(sum(taken))
        self._inside.all_to_all(part, block, given, taken)
        return block

    def _amount(self, sizes: Sequence[int], carrier: int, rank: int, carriers: int) -> int:
        """Elements that a rank of this host gets from, or gives to, a carrier; both by their local ranks."""
        is_its = carrier < carriers and rank % carriers == carrier
        return sizes[self.hosts[self._host][rank]] if is_its else 0


def _operands(source: Tensor, result: Tensor, reduction: str) -> tuple[Tensor, Tensor, str]:
    """What is computed with: flat, real, in fp32 if sums are of half precision; and the reduction without
    its division."""
    inner = "sum" if reduction == "avg" else reduction
    if source.dtype.is_complex:
        source, result = torch.view_as_real(source), torch.view_as_real(result)
    given, taken = source.reshape(-1), result.view(-1)
    if source.dtype in _HALF and inner in ("sum", "product"):
        return given.float(), torch.empty_like(taken, dtype=torch.float32), inner
    return given, taken, inner


def _give(taken: Tensor, result: Tensor) -> None:
    if taken.dtype != result.dtype and result.dtype in _HALF:
        result.view(-1).copy_(taken)


def _joined(parts: Sequence[Tensor], whole: Tensor) -> Tensor:
    """The parts one after the other: ``whole`` if they are so already."""
    address = whole.data_ptr()
    for part in parts:
        if part.numel() and part.data_ptr() != address:
            return torch.cat(list(parts))
        address += part.numel() * part.element_size()
    return whole
