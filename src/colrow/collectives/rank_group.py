"""The ranks of one process group, how a collective among them is begun, and what they have moved so far.

A collective on the CPU goes through the memory that the ranks of a host share, which a group's first one sets
up; others go to ``torch.distributed``.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.collectives import shared, through_torch
from colrow.collectives.failure import diagnose, register_member
from colrow.collectives.network import waits_for_network
from colrow.collectives.pending import Pending, Step, Work
from colrow.collectives.statistics import Call, CommStats, current_phase
from colrow.transport import Memory, share_memory
from colrow.transport.work import Interruptible

_SAME_SIZE = ("all_reduce", "reduce_scatter", "broadcast")
"""Collectives whose payload is of one size on all ranks."""
_KNOWN_CALLS = 4096
"""All-reduces that a group remembers, by label, phase and payload, so as not to describe them anew."""


class RankGroup:
    """One process group: who is in it, how its collectives begin, and what they have moved so far.

    Attributes:
        rank: this process's rank within the group.
        size: number of ranks in the group.
        global_ranks: the job-wide ranks of the members, in group order.
        name: by which torch, and so a compiled graph, finds the process group.
        statistics: count and bytes of all collectives since start or the last reset.
        sequence: a checksum of the collectives so far, in order: equal on all ranks unless they went
            different ways.
        overlaps: collectives on the CPU wait for a network, so that a rank should compute meanwhile: gloo is
            used alone, between hosts, and is slow. Known after the first collective; equal on all ranks.
        serves_cpus: the group's backend is one for tensors on CPUs: what is on meta now will be there.
    """

    # as of a group that is not there: what plays one has no process group
    _may_share = False
    _sums_in_half = True
    _shared: Memory | None = None
    overlaps = False
    serves_cpus = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.global_ranks = tuple(dist.get_process_group_ranks(group))
        self.name = group.group_name
        self.statistics = CommStats()
        self.sequence = 0
        backend = dist.get_backend(group)
        self.serves_cpus = backend in ("gloo", "shm")
        self._sums_in_half = backend == "gloo"
        self._may_share = self.serves_cpus and self.size > 1
        self._known = lru_cache(maxsize=_KNOWN_CALLS)(self._know)
        register_member()

    def __repr__(self) -> str:
        position = f"rank {self.rank} of {self.size}, global ranks {list(self.global_ranks)}"
        return f"{type(self).__name__}({position})"

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self  # a copied model talks to the same ranks

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a model that has been parallelized cannot be pickled whole, as torch.save(model) does, since it "
            "belongs to its process group: save it with colrow.save_pretrained, or put it back together with "
            "colrow.unshard first"
        )

    def _begin(
        self,
        operation: str,
        label: str,
        payload: int,
        start: Callable[[], Work | None],
        finish: Callable[[], Tensor],
    ) -> Pending:
        return self.begin_call(self.record(operation, label, payload), start, finish)

    def record(self, operation: str, label: str, payload: int) -> Call:
        """Count a collective that is about to begin."""
        call = Call(operation, label, current_phase(), payload)
        self.statistics.record(call)
        common = payload if operation in _SAME_SIZE else ""
        self.sequence = zlib.crc32(f"{operation}{label}{common}".encode(), self.sequence)
        return call

    def begin_call(
        self, call: Call, start: Callable[[], Work | None], finish: Callable[[], Tensor]
    ) -> Pending:
        """Begin a collective that has been counted, or a part of it."""
        begin = time.perf_counter()
        try:
            work = start()
            if self.serves_cpus and isinstance(work, dist.Work):
                work = Interruptible(work)
        except RuntimeError as error:
            raise diagnose(error, call, self.global_ranks) from error
        self.statistics.add_seconds(call, time.perf_counter() - begin)
        return Pending(call, self.global_ranks, self.statistics, work, finish)

    def _shares(self, tensor: Tensor, operation: str, label: str) -> Memory | None:
        """The ranks' shared memory, if it takes such tensors."""
        if not (self._may_share and tensor.is_cpu):
            return None
        if self._shared is None:
            self._join(operation, label)
        return self._shared

    def _join(self, operation: str, label: str) -> None:
        """Agree with the other ranks on shared memory; a failure is that of the group's first collective."""

        def agree() -> None:
            self._shared = share_memory(self.group)
            if self._shared is None:
                self.overlaps = waits_for_network(self.group)

        Step(Call(operation, label, current_phase(), 0), self.global_ranks).wait(agree)
        self._may_share = self._shared is not None

    def _start(
        self,
        operation: str,
        label: str,
        tensor: Tensor,
        in_memory: Callable[[Memory], shared.Plan],
        by_torch: Callable[[], through_torch.Begun],
        *,
        reduction: str = "",
        payload: int | None = None,
    ) -> Pending:
        """Begin a collective on ``tensor``. In shared memory it is complete when this returns."""
        payload = tensor.numel() * tensor.element_size() if payload is None else payload
        memory = self._shares(tensor, operation, label)
        if memory is None or (reduction and not memory.can_reduce(tensor.dtype, reduction)):
            return self._begin(operation, label, payload, *by_torch())
        run, finish = in_memory(memory)
        pending = self._begin(operation, label, payload, lambda: shared.Blocking(run), finish)
        pending.wait()
        return pending

    def sum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which dtype to send numbers that are summed by another transport than shared memory.

        gloo adds half-precision numbers in half precision: above two ranks that rounds repeatedly.
        """
        half = dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if half and self._sums_in_half and self.size > 2 else dtype

    def _reduce_in_memory(self, tensor: Tensor, reduction: str, label: str, owned: bool) -> Pending | None:
        """An all-reduce, complete, as :meth:`_start` would do it with more around it; ``None`` if it cannot.

        It is the collective of every layer, several times in each pass.
        """
        memory = self._shares(tensor, "all_reduce", label)
        if memory is None or not memory.can_reduce(tensor.dtype, reduction):
            return None
        call, text = self._known(label, current_phase(), tensor.numel() * tensor.element_size())
        self.sequence = zlib.crc32(text, self.sequence)
        tally = self.statistics.record(call)
        pending = shared.Reduction(call, self.global_ranks, tally, memory, tensor, reduction, owned)
        pending.wait()
        return pending

    def _know(self, label: str, phase: str, payload: int) -> tuple[Call, bytes]:
        """An all-reduce, and what of it goes into the checksum of all collectives."""
        return Call("all_reduce", label, phase, payload), f"all_reduce{label}{payload}".encode()
