"""Shared memory as a backend of ``torch.distributed``.

``dist.init_process_group("shm")`` after ``import colrow`` makes a process group for CPU tensors whose
collectives go through shared memory wherever the ranks of each host can share it, and through gloo otherwise.
What only gloo has (sending and receiving, sparse tensors, gathering to one rank) goes to gloo always.
:func:`colrow.init_mesh` joins with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, Store
from torch.distributed import ProcessGroup, ProcessGroupGloo

from colrow.transport.operands import check_dtypes, copy_back, part_sizes, plain, real
from colrow.transport.rendezvous import Memory, join
from colrow.transport.work import Completed, Waiting

BACKEND = "shm"
_HALF = (torch.bfloat16, torch.float16)
_REDUCTIONS: dict[Any, str] = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.PRODUCT: "product",
    dist.ReduceOp.MIN: "min",
    dist.ReduceOp.MAX: "max",
    dist.ReduceOp.AVG: "avg",
    dist.ReduceOp.BAND: "band",
    dist.ReduceOp.BOR: "bor",
    dist.ReduceOp.BXOR: "bxor",
}


# groups that others made, of gloo alone, whose ranks share memory for colrow's own collectives
_beside_gloo: WeakKeyDictionary[ProcessGroup, Memory | None] = WeakKeyDictionary()


def share_memory(group: ProcessGroup) -> Memory | None:
    """Share memory with the other ranks of a process group for CPU tensors, if all of them can.

    Collective when called for the first time. On groups of the gloo backend too, whose own collectives stay
    as they are.

    Raises:
        ValueError: see :func:`colrow.transport.join`.
        RuntimeError: if gloo fails.
    """
    if isinstance(group, SharedMemoryProcessGroup):
        return group.shared_memory()
    if group not in _beside_gloo:
        gloo = group._get_backend(torch.device("cpu"))
        _, store = dist.distributed_c10d._world.pg_map[group]
        _beside_gloo[group] = join(gloo, store, dist.get_rank(group), dist.get_process_group_ranks(group))
    return _beside_gloo[group]


def leave_destroyed_groups() -> None:
    """Leave the memory of gloo groups that were destroyed: nobody tells, so this is called now and then."""
    for group, shared in list(_beside_gloo.items()):
        if shared is not None and group not in dist.distributed_c10d._world.pg_map:
            shared.close()


def register() -> None:
    """Make the backend known to ``torch.distributed``; once per process, further calls do nothing."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def _create(options: Any, backend_options: object) -> SharedMemoryProcessGroup:
    return SharedMemoryProcessGroup(
        options.store,
        options.group_rank,
        options.group_size,
        options.timeout,
        options.group_id,
        tuple(options.global_ranks_in_group) or tuple(range(options.group_size)),
    )


class SharedMemoryProcessGroup(ProcessGroup):
    """A process group for CPU tensors, with a gloo group inside.

    Results are there when a call returns, with ``async_op`` too.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: timedelta,
        name: str,
        global_ranks: tuple[int, ...],
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        gloo = ProcessGroupGloo(store, rank, size, timeout=timeout)
        gloo._set_sequence_number_for_group()
        self._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
        self._set_default_backend(ProcessGroup.BackendType.GLOO)
        self._gloo: Any = gloo  # torch's hints do not know its methods
        self._own_rank, self._own_size = rank, size
        self._own_name = name
        self._own_store = store
        self._global_ranks = global_ranks
        self._shared: Memory | None = None
        self._has_joined = size == 1

    def getBackendName(self) -> str:
        return BACKEND

    def getGroupName(self) -> str:
        return self._own_name

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return self._own_name

    def rank(self) -> int:
        return self._own_rank

    def size(self) -> int:
        return self._own_size

    def shared_memory(self, operation: str = "") -> Memory | None:
        """The group in shared memory, or ``None`` if gloo serves. Collective when called for the first time.

        With an ``operation``, a failure is told as that of the group's first collective.

        Raises:
            ValueError: see :func:`colrow.transport.join`.
            RuntimeError: if gloo fails.
        """
        if not self._has_joined:
            if operation:
                Waiting(operation, self._global_ranks).wait(self._join, RuntimeError)
            else:
                self._join()
        return self._shared

    def _join(self) -> None:
        self._shared = join(self._gloo, self._own_store, self._own_rank, self._global_ranks)
        self._has_joined = True

    def shutdown(self) -> None:
        self._leave()
        super().shutdown()

    def abort(self) -> None:
        self._leave()
        super().abort()

    def _leave(self) -> None:
        self._has_joined = True
        if self._shared is not None:
            self._shared.close()

    def _shares(self, operation: str, tensors: Sequence[Tensor]) -> Memory | None:
        """Shared memory, if it can take these: decided by what is the same on all ranks."""
        if any(tensor.device.type != "cpu" or tensor.layout != torch.strided for tensor in tensors):
            return None
        return self.shared_memory(operation)

    def _reduces(self, operation: str, tensors: Sequence[Tensor], how: Any) -> tuple[Memory | None, str]:
        shared = self._shares(operation, tensors)
        reduction = _REDUCTIONS.get(how.op, "")
        if shared is None or not all(shared.can_reduce(tensor.dtype, reduction) for tensor in tensors):
            return None, reduction
        return shared, reduction

    def _counts(self, operation: str, parts: Sequence[Tensor], own: Tensor) -> tuple[int, ...]:
        """Elements of each rank's part, of which ``own`` is this rank's."""
        counts = tuple(part.numel() for part in parts)
        if len(counts) != self._own_size or counts[self._own_rank] != own.numel():
            raise ValueError(
                f"{operation}: parts of {list(counts)} elements for {self._own_size} ranks, where this one's "
                f"(number {self._own_rank}) has {own.numel()}"
            )
        return counts

    def _run(self, operation: str, function: Callable[[], None], result: list[Tensor]) -> dist.Work:
        Waiting(operation, self._global_ranks).wait(function)
        return Completed(result)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        opts = opts or dist.AllreduceOptions()
        shared, reduction = self._reduces("all_reduce", tensors, opts.reduceOp)
        if shared is None:
            return self._reduce_through_gloo([real(tensor) for tensor in tensors], opts)

        def run() -> None:
            for tensor in tensors:
                buffer = plain(tensor)
                shared.all_reduce(buffer, buffer, reduction)
                copy_back(buffer, tensor)

        return self._run("all_reduce", run, tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self.allreduce(tensors, opts or dist.AllreduceCoalescedOptions())

    def _reduce_through_gloo(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        """Gloo adds half precision in half precision, which above two ranks rounds repeatedly."""
        single = dist.AllreduceOptions()
        single.reduceOp, single.timeout = opts.reduceOp, opts.timeout
        works = []
        for tensor in tensors:
            is_widened = tensor.dtype in _HALF and self._own_size > 2
            # of one that is not contiguous gloo reduces some of the numbers
            is_strided = tensor.layout == torch.strided
            buffer = tensor.float() if is_widened else plain(tensor) if is_strided else tensor
            work = self._gloo.allreduce([buffer], single)
            if buffer is tensor:
                works.append(work)
            else:
                work.wait()
                copy_back(buffer, tensor)
        if len(works) == 1 and len(tensors) == 1:
            return works[0]
        for work in works:
            work.wait()
        return Completed(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        opts = opts or dist.BroadcastOptions()
        shared = self._shares("broadcast", tensors)
        if shared is None:
            return self._gloo.broadcast([real(tensor) for tensor in tensors], opts)

        def run() -> None:
            for tensor in tensors:
                buffer = plain(tensor)
                shared.broadcast(buffer, opts.rootRank)
                copy_back(buffer, tensor)

        return self._run("broadcast", run, tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        opts = opts or AllgatherOptions()
        shared = self._shares("all_gather", inputs)
        if shared is None:
            parts = [[real(part) for part in one] for one in outputs]
            return self._gloo.allgather(parts, [real(tensor) for tensor in inputs], opts)

        def run() -> None:
            for parts, source in zip(outputs, inputs, strict=True):
                check_dtypes([source, *parts])
                counts = self._counts("all_gather", parts, source)
                result = source.new_empty(sum(counts))
                shared.all_gather(plain(source), result, counts)
                for part, piece in zip(parts, result.split(counts), strict=True):
                    copy_back(piece.view_as(part), part)

        return self._run("all_gather", run, [part for parts in outputs for part in parts])

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        opts = opts or AllgatherOptions()
        shared = self._shares("all_gather", [*outputs, *inputs])
        if shared is None:
            works = [
                self._gloo._allgather_base(real(output), real(source), opts)
                for output, source in zip(outputs, inputs, strict=True)
            ]
            return _last(works, outputs)

        def run() -> None:
            for output, source in zip(outputs, inputs, strict=True):
                check_dtypes([output, source])
                if output.numel() != source.numel() * self._own_size:
                    raise ValueError(
                        f"all_gather: {source.numel()} elements of each of {self._own_size} ranks do not "
                        f"fill an output of {output.numel()}"
                    )
                buffer = plain(output)
                shared.all_gather(plain(source), buffer)
                copy_back(buffer, output)

        return self._run("all_gather", run, outputs)

    def reduce_scatter(  # type: ignore[override]
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> dist.Work:
        opts = opts or dist.ReduceScatterOptions()
        shared, reduction = self._reduces("reduce_scatter", outputs, opts.reduceOp)
        if shared is None:
            parts = [[real(part) for part in one] for one in inputs]
            return self._gloo.reduce_scatter([real(tensor) for tensor in outputs], parts, opts)

        def run() -> None:
            for output, parts in zip(outputs, inputs, strict=True):
                check_dtypes([output, *parts])
                counts = self._counts("reduce_scatter", parts, output)
                source = torch.cat([part.reshape(-1) for part in parts])
                buffer = plain(output)
                shared.reduce_scatter(source, buffer, counts, reduction)
                copy_back(buffer, output)

        return self._run("reduce_scatter", run, outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        opts = opts or dist.ReduceScatterOptions()
        shared, reduction = self._reduces("reduce_scatter", [*outputs, *inputs], opts.reduceOp)
        if shared is None:
            works = [
                self._gloo._reduce_scatter_base(real(output), real(source), opts)
                for output, source in zip(outputs, inputs, strict=True)
            ]
            return _last(works, outputs)

        def run() -> None:
            for output, source in zip(outputs, inputs, strict=True):
                check_dtypes([output, source])
                if source.numel() != output.numel() * self._own_size:
                    raise ValueError(
                        f"reduce_scatter: an input of {source.numel()} elements is not {output.numel()} "
                        f"for each of {self._own_size} ranks"
                    )
                buffer = plain(output)
                shared.reduce_scatter(plain(source), buffer, None, reduction)
                copy_back(buffer, output)

        return self._run("reduce_scatter", run, outputs)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
    ) -> dist.Work:
        opts = opts or dist.AllToAllOptions()
        shared = self._shares("all_to_all", [output, input])
        if shared is None:
            return self._gloo.alltoall_base(
                real(output), real(input), list(output_split_sizes), list(input_split_sizes), opts
            )

        def run() -> None:
            check_dtypes([output, input])
            given = part_sizes(input, input_split_sizes, self._own_size)
            taken = part_sizes(output, output_split_sizes, self._own_size)
            buffer = plain(output)
            shared.all_to_all(plain(input), buffer, given, taken)
            copy_back(buffer, output)

        return self._run("all_to_all", run, [output])

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Which gloo does not have."""
        given = [part.numel() for part in inputs]
        taken = [part.numel() for part in outputs]
        source = torch.cat([part.reshape(-1) for part in inputs])
        result = source.new_empty(sum(taken))
        self.all_to_all_single(result, source, taken, given, opts).wait()
        for output, piece in zip(outputs, result.split(taken), strict=True):
            copy_back(piece.view_as(output), output)
        return Completed(outputs)

    def barrier(self, opts: Any = None) -> dist.Work:
        opts = opts or dist.BarrierOptions()
        shared = self.shared_memory("barrier")
        if shared is None:
            return self._gloo.barrier(opts)
        return self._run("barrier", shared.barrier, [])

    # names in torch before 2.13
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]
    alltoall_base = all_to_all_single  # type: ignore[assignment]


def _last(works: list[dist.Work], result: list[Tensor]) -> dist.Work:
    """One for several under way."""
    if len(works) == 1:
        return works[0]
    for work in works:
        work.wait()
    return Completed(result)
