"""The plain (not differentiable) collectives among the ranks of a process group.

Nothing here writes into a tensor of the caller's: results are in memory that the collective itself allocated,
because a gradient handed to a backward may be shared and a forward input may be saved by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colrow.collectives import shared, through_torch
from colrow.collectives.pending import Pending
from colrow.collectives.rank_group import RankGroup
from colrow.collectives.shapes import (
    check_dimension,
    exchanged_shapes,
    gathered_sizes,
    in_a_row,
    joined,
    scattered_sizes,
)
from colrow.collectives.statistics import CommStats
from colrow.collectives.subgroups import check_members, make_subgroup
from colrow.transport import Memory

Group: TypeAlias = "Communicator | dist.ProcessGroup | DeviceMesh"
"""What the public functions accept as a group of ranks: a mesh means its only dimension, or ``tp``."""


class Communicator(RankGroup):
    """One process group with its collectives; see :class:`RankGroup` for its attributes.

    Get one with :func:`communicator`; there is one per process group, so that statistics add up.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._subgroups: dict[tuple[int, ...], Communicator] = {}

    def start_all_reduce(
        self, tensor: Tensor, reduction: str = "sum", *, label: str = "", owned: bool = False
    ) -> Pending:
        """Elementwise ``sum``, ``max`` or ``min`` over the ranks; the same bits on each of them.

        Args:
            tensor: any shape and strides, the same shape and dtype on every rank.
            reduction: ``sum``, ``max`` or ``min``.
            label: names the collective in errors and statistics.
            owned: the caller allocated ``tensor`` for this call and gives it away: reduce it in place.
        """
        if self.size == 1:
            return Pending.completed(tensor if owned else tensor.clone())
        pending = self._reduce_in_memory(tensor, reduction, label, owned)
        if pending is not None:
            return pending
        by_torch = through_torch.all_reduce(self, tensor, reduction, owned)
        return self._begin("all_reduce", label, tensor.numel() * tensor.element_size(), *by_torch)

    def start_all_gather(
        self, shard: Tensor, dimension: int, sizes: Sequence[int] | None = None, *, label: str = ""
    ) -> Pending:
        """Concatenation along ``dimension`` of the shards of all ranks, in rank order.

        Args:
            shard: this rank's part; shapes may differ between ranks along ``dimension`` only.
            dimension: the cut dimension.
            sizes: extent of ``dimension`` on each rank; ``None`` says that all are equal.
            label: names the collective in errors and statistics.
        """
        if self.size == 1:
            return Pending.completed(shard.clone())
        dimension = check_dimension(dimension, shard)
        sizes = gathered_sizes(shard, dimension, sizes, self.rank, self.size)
        rest = math.prod(shard.shape[:dimension] + shard.shape[dimension + 1 :])
        return self._start(
            "all_gather",
            label,
            shard,
            lambda memory: shared.all_gather(memory, shard, dimension, sizes),
            lambda: through_torch.all_gather(self, shard, dimension, sizes),
            payload=shard.element_size() * rest * sum(sizes),
        )

    def start_reduce_scatter(
        self, tensor: Tensor, dimension: int, sizes: Sequence[int] | None = None, *, label: str = ""
    ) -> Pending:
        """This rank's part, along ``dimension``, of the sum over the ranks.

        Args:
            tensor: the same shape on every rank.
            dimension: the dimension to cut.
            sizes: extent that each rank gets; ``None`` says that all are equal.
            label: names the collective in errors and statistics.
        """
        if self.size == 1:
            return Pending.completed(tensor.clone())
        dimension = check_dimension(dimension, tensor)
        sizes = scattered_sizes(tensor, dimension, sizes, self.size)
        by_gloo = self.serves_cpus and tensor.is_cpu
        by_torch = through_torch.reduce_scatter_by_gloo if by_gloo else through_torch.reduce_scatter
        return self._start(
            "reduce_scatter",
            label,
            tensor,
            lambda memory: shared.reduce_scatter(memory, tensor, dimension, sizes),
            lambda: by_torch(self, tensor, dimension, sizes),
            reduction="sum",
        )

    def start_all_to_all(
        self,
        tensor: Tensor,
        split_dimension: int,
        split_sizes: Sequence[int],
        concat_dimension: int,
        concat_sizes: Sequence[int],
        *,
        label: str = "",
    ) -> Pending:
        """Cut ``tensor`` along one dimension, send part r to rank r, concatenate what arrives along another.

        Args:
            tensor: full along ``split_dimension``, this rank's part along ``concat_dimension``.
            split_dimension: dimension to cut.
            split_sizes: extent of ``split_dimension`` that goes to each rank.
            concat_dimension: dimension along which the parts of the others are joined.
            concat_sizes: extent of ``concat_dimension`` on each rank before the call.
            label: names the collective in errors and statistics.
        """
        if self.size == 1:
            return Pending.completed(tensor.clone())
        split_dimension = check_dimension(split_dimension, tensor)
        concat_dimension = check_dimension(concat_dimension, tensor)
        shapes = exchanged_shapes(
            tensor, split_dimension, split_sizes, concat_dimension, concat_sizes, self.rank, self.size
        )
        pieces = tensor.split(list(split_sizes), split_dimension)
        source = in_a_row(tensor, split_dimension, split_sizes)
        given = [piece.numel() for piece in pieces]
        taken = [torch.Size(shape).numel() for shape in shapes]

        return self._exchange(
            "all_to_all", label, source, given, taken, lambda row: joined(row, concat_dimension, shapes)
        )

    def start_shift(self, tensor: Tensor, shape: Sequence[int], *, label: str = "") -> Pending:
        """``tensor`` goes to the next rank of a ring of all ranks; what the previous one gives comes in.

        Args:
            tensor: any shape, which may differ between ranks; the same dtype on every rank.
            shape: of the tensor that the previous rank gives.
            label: names the collective in errors and statistics.
        """
        if self.size == 1:
            return Pending.completed(tensor.clone())
        source = tensor.contiguous().view(-1)
        given, taken = [0] * self.size, [0] * self.size
        given[(self.rank + 1) % self.size] = source.numel()
        taken[self.rank - 1] = math.prod(shape)
        return self._exchange("shift", label, source, given, taken, lambda row: row.view(tuple(shape)))

    def start_exchange(
        self, tensor: Tensor, given: Sequence[int], taken: Sequence[int], *, label: str = ""
    ) -> Pending:
        """Rows of ``tensor`` to each rank, and what comes from each rank, in rank order: any numbers of rows.

        Args:
            tensor: rows for each rank, one after the other along dimension 0; ranks' tensors may differ in
                dimension 0 only.
            given: how many rows go to each rank.
            taken: how many rows come from each rank: what that rank gives to this one.
            label: names the collective in errors and statistics.

        Raises:
            ValueError: if the numbers do not fit the tensor or the group.
        """
        if len(given) != self.size or len(taken) != self.size or sum(given) != tensor.shape[0]:
            raise ValueError(
                f"{list(given)} rows given and {list(taken)} taken do not fit {tensor.shape[0]} rows on "
                f"{self.size} ranks"
            )
        if self.size == 1:
            return Pending.completed(tensor.clone())
        rest = math.prod(tensor.shape[1:])
        shape = (sum(taken), *tensor.shape[1:])
        return self._exchange(
            "all_to_all",
            label,
            tensor.contiguous().view(-1),
            [rows * rest for rows in given],
            [rows * rest for rows in taken],
            lambda row: row.view(shape),
        )

    def _exchange(
        self,
        operation: str,
        label: str,
        source: Tensor,
        given: Sequence[int],
        taken: Sequence[int],
        finish: Callable[[Tensor], Tensor],
    ) -> Pending:
        """Parts of ``source``, of so many elements, to each rank, and what comes from each in their order."""

        def by_torch() -> through_torch.Begun:
            start, received = through_torch.all_to_all(self, source, given, taken)
            return start, lambda: finish(received())

        def in_memory(memory: Memory) -> shared.Plan:
            run, received = shared.all_to_all(memory, source, given, taken)
            return run, lambda: finish(received())

        return self._start(operation, label, source, in_memory, by_torch)

    def start_broadcast(
        self, tensor: Tensor, source: int, *, label: str = "", owned: bool = False
    ) -> Pending:
        """The tensor of group rank ``source``; all ranks give a tensor of its shape and dtype.

        With ``owned`` the caller allocated ``tensor`` for this call and gives it away: receive in place.
        """
        if self.size == 1:
            return Pending.completed(tensor if owned else tensor.clone())
        return self._start(
            "broadcast",
            label,
            tensor,
            lambda memory: shared.broadcast(memory, tensor, source, owned),
            lambda: through_torch.broadcast(self, tensor, source, owned),
        )

    def start_reduce(
        self, tensor: Tensor, destination: int, *, label: str = "", owned: bool = False
    ) -> Pending:
        """The sum over the ranks on group rank ``destination``; what the other ranks get has no meaning.

        With ``owned`` the caller allocated ``tensor`` for this call and gives it away: reduce in place.
        """
        if self.size == 1:
            return Pending.completed(tensor if owned else tensor.clone())
        return self._start(
            "reduce",
            label,
            tensor,
            lambda memory: shared.reduce(memory, tensor, destination),
            lambda: through_torch.reduce(self, tensor, destination, owned),
            reduction="sum",
        )

    def all_reduce(self, tensor: Tensor, reduction: str = "sum", *, label: str = "") -> Tensor:
        """See :meth:`start_all_reduce`."""
        return self.start_all_reduce(tensor, reduction, label=label).wait()

    def all_gather(
        self, shard: Tensor, dimension: int, sizes: Sequence[int] | None = None, *, label: str = ""
    ) -> Tensor:
        """See :meth:`start_all_gather`."""
        return self.start_all_gather(shard, dimension, sizes, label=label).wait()

    def reduce_scatter(
        self, tensor: Tensor, dimension: int, sizes: Sequence[int] | None = None, *, label: str = ""
    ) -> Tensor:
        """See :meth:`start_reduce_scatter`."""
        return self.start_reduce_scatter(tensor, dimension, sizes, label=label).wait()

    def broadcast(self, tensor: Tensor, source: int, *, label: str = "") -> Tensor:
        """See :meth:`start_broadcast`."""
        return self.start_broadcast(tensor, source, label=label).wait()

    def gather(self, shard: Tensor, shapes: Sequence[Sequence[int]], *, label: str = "") -> list[Tensor]:
        """All ranks' tensors on group rank 0, which gets a list in rank order; the others get ``[]``.

        Args:
            shard: this rank's tensor.
            shapes: the shape of each rank's tensor; they may differ in everything but the dtype.
            label: names the collective in errors and statistics.
        """
        if self.size == 1:
            return [shard.clone()]
        counts = [torch.Size(shape).numel() for shape in shapes]
        source = shard.contiguous().view(-1)
        is_root = self.rank == 0
        taken, given = counts if is_root else [0] * self.size, [source.numel()] + [0] * (self.size - 1)
        result = self._exchange("gather", label, source, given, taken, lambda received: received).wait()
        if not is_root:
            return []
        return [part.view(tuple(shape)) for part, shape in zip(result.split(counts), shapes, strict=True)]

    def barrier(self, *, label: str = "barrier") -> None:
        """Return once every rank of the group has called this."""
        if self.size > 1:
            token = torch.zeros(1, device="cpu" if self.serves_cpus else "cuda")
            self.start_all_reduce(token, label=label).wait()

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        """A communicator among some ranks of this group; made by the first call, then kept.

        The first call is collective among the members, and each rank must make its subgroups in an order
        that does not contradict the others'; how many groups a rank has made besides does not matter.
        Backend and timeout are this group's.

        Args:
            ranks: ranks within this group, in the order they shall have; this rank must be one of them.

        Raises:
            ValueError: if this rank is not a member, or a rank is named twice or is not in this group.
            RankFailure: if another member died, raised or did not come within the group's timeout.
        """
        members = tuple(ranks)
        if members == tuple(range(self.size)):
            return self
        if members not in self._subgroups:
            members = check_members(members, self.rank, self.size)
            device = "cpu" if self.serves_cpus else "cuda"
            group = make_subgroup(self.group, device, [self.global_ranks[rank] for rank in members])
            self._subgroups[members] = communicator(group)
        return self._subgroups[members]

    def with_subgroups(self) -> Iterator[Communicator]:
        """This communicator and those made of it."""
        yield self
        for subgroup in self._subgroups.values():
            yield from subgroup.with_subgroups()


# torch keeps one registry of process groups per process; this is the same one with what colrow adds
_communicators: dict[dist.ProcessGroup, Communicator] = {}


def communicator(group: Group) -> Communicator:
    """The communicator of a process group or of a mesh's only (else its ``tp``) dimension.

    Raises:
        ValueError: if this process is not in the group, or a mesh has several dimensions, none of them tp.
    """
    if isinstance(group, Communicator):
        return group
    if isinstance(group, DeviceMesh):
        names = group.mesh_dim_names or ()
        if group.ndim > 1 and "tp" not in names:
            raise ValueError(f"the mesh has the dimensions {names}: pass mesh['name'] of one of them")
        group = group.get_group("tp" if group.ndim > 1 else 0)
    if dist.get_rank(group) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in the group that it was given")
    found = _communicators.get(group)
    if found is None:
        for gone in _communicators.keys() - dist.distributed_c10d._world.pg_map.keys():
            del _communicators[gone]  # its process group was destroyed
        found = _communicators[group] = Communicator(group)
    return found


def comm_stats(group: Group | None = None) -> CommStats:
    """Count, bytes and seconds of the collectives that this rank took part in since the last reset.

    Graphs that torch.compile made are not seen: what they move is not counted.

    Args:
        group: count this group and the subgroups made of it; default: all groups together.
    """
    if group is not None:
        return CommStats().merge(one.statistics for one in communicator(group).with_subgroups())
    return CommStats().merge(one.statistics for one in _communicators.values())


def reset_comm_stats() -> None:
    """Set all counters of this rank to zero."""
    for one in _communicators.values():
        one.statistics.tallies.clear()
