"""The differentiable collectives as functions. Types (R, I, V, P) and adjoints: see ``typed``.

Each takes a process group, a mesh (its only dimension, else ``tp``) or a communicator, and a label that
names the collective in errors and statistics. The ``_async`` forms return at once; their ``wait()`` gives
the result. All raise :class:`colrow.RankFailure` if another rank died, raised or did not come in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from colrow.collectives.communicator import Group, communicator
from colrow.collectives.typed import (
    AllGather,
    AllReduce,
    AllToAll,
    Enter,
    FirstRankOnly,
    PendingResult,
    ReduceScatter,
    Sizes,
    Slice,
)

Replication = Literal["I", "R"]
"""``"I"`` if every rank computes the same with the value, ``"R"`` if each uses it for its own part."""


def enter(x: Tensor, group: Group, *, label: str = "enter") -> Tensor:
    """I → R: identity forward, all-reduce of the gradient. ``x``: any shape, equal on all ranks."""
    return Enter(communicator(group), label)(x)


def all_reduce(x: Tensor, group: Group, *, dst: Replication = "I", label: str = "all_reduce") -> Tensor:
    """P → I (gradient passes unchanged) or P → R (gradient is summed too): the sum over the ranks.

    ``x`` has any shape, the same on every rank.
    """
    return AllReduce(communicator(group), label, dst)(x)


def all_reduce_async(
    x: Tensor, group: Group, *, dst: Replication = "I", label: str = "all_reduce"
) -> PendingResult:
    """:func:`all_reduce`, under way."""
    return AllReduce(communicator(group), label, dst).begin(x)


def all_gather(
    x: Tensor,
    group: Group,
    dimension: int,
    *,
    sizes: Sequence[int] | None = None,
    dst: Replication = "R",
    label: str = "all_gather",
) -> Tensor:
    """V → R (gradient is reduce-scattered) or V → I (gradient is sliced): parts joined in rank order.

    ``sizes`` gives the extent of ``dimension`` on each rank; by default all are equal.
    """
    return AllGather(communicator(group), label, dimension, _sizes(sizes), dst)(x)


def all_gather_async(
    x: Tensor,
    group: Group,
    dimension: int,
    *,
    sizes: Sequence[int] | None = None,
    dst: Replication = "R",
    label: str = "all_gather",
) -> PendingResult:
    """:func:`all_gather`, under way."""
    return AllGather(communicator(group), label, dimension, _sizes(sizes), dst).begin(x)


def reduce_scatter(
    x: Tensor,
    group: Group,
    dimension: int,
    *,
    sizes: Sequence[int] | None = None,
    label: str = "reduce_scatter",
) -> Tensor:
    """P → V (gradient is all-gathered): this rank's part, along ``dimension``, of the sum over the ranks.

    ``sizes`` gives the extent that each rank gets; by default all are equal.
    """
    return ReduceScatter(communicator(group), label, dimension, _sizes(sizes))(x)


def reduce_scatter_async(
    x: Tensor,
    group: Group,
    dimension: int,
    *,
    sizes: Sequence[int] | None = None,
    label: str = "reduce_scatter",
) -> PendingResult:
    """:func:`reduce_scatter`, under way."""
    return ReduceScatter(communicator(group), label, dimension, _sizes(sizes)).begin(x)


def slice_local(
    x: Tensor,
    group: Group,
    dimension: int,
    *,
    sizes: Sequence[int] | None = None,
    src: Replication = "R",
    label: str = "slice",
) -> Tensor:
    """R → V (gradient is partial: zeros elsewhere) or I → V (gradient is all-gathered): a part of ``x``."""
    return Slice(communicator(group), label, dimension, _sizes(sizes), src)(x)


def first_rank_only(
    x: Tensor, group: Group, *, src: Replication = "I", label: str = "first_rank_only"
) -> Tensor:
    """I → P or R → P: ``x`` on the group's first rank, zeros on the others: their sum counts it once."""
    return FirstRankOnly(communicator(group), label, src)(x)


def all_to_all(
    x: Tensor,
    group: Group,
    split_dimension: int,
    concat_dimension: int,
    *,
    split_sizes: Sequence[int],
    concat_sizes: Sequence[int],
    label: str = "all_to_all",
) -> Tensor:
    """V → V: from cut along ``concat_dimension`` to cut along ``split_dimension`` (gradient: the reverse).

    Args:
        x: this rank's part: whole along ``split_dimension``, cut along ``concat_dimension``.
        group: process group, mesh or communicator.
        split_dimension: dimension that is cut afterwards.
        concat_dimension: dimension that is whole afterwards.
        split_sizes: extent of ``split_dimension`` on each rank afterwards.
        concat_sizes: extent of ``concat_dimension`` on each rank before.
        label: names the collective in errors and statistics.
    """
    splits, joins = tuple(split_sizes), tuple(concat_sizes)
    return AllToAll(communicator(group), label, split_dimension, splits, concat_dimension, joins)(x)


def all_to_all_async(
    x: Tensor,
    group: Group,
    split_dimension: int,
    concat_dimension: int,
    *,
    split_sizes: Sequence[int],
    concat_sizes: Sequence[int],
    label: str = "all_to_all",
) -> PendingResult:
    """:func:`all_to_all`, under way."""
    splits, joins = tuple(split_sizes), tuple(concat_sizes)
    return AllToAll(communicator(group), label, split_dimension, splits, concat_dimension, joins).begin(x)


def _sizes(sizes: Sequence[int] | None) -> Sizes:
    return None if sizes is None else tuple(sizes)
