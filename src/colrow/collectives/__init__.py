"""Collectives among ranks: typed and differentiable, or plain; counted, labelled, with a timeout."""

from colrow.collectives.communicator import (
    Communicator,
    Group,
    comm_stats,
    communicator,
    reset_comm_stats,
)
from colrow.collectives.functions import (
    all_gather,
    all_gather_async,
    all_reduce,
    all_reduce_async,
    all_to_all,
    all_to_all_async,
    enter,
    first_rank_only,
    reduce_scatter,
    reduce_scatter_async,
    slice_local,
)
from colrow.collectives.in_chunks import all_reduce_of
from colrow.collectives.pending import Pending
from colrow.collectives.statistics import Call, CommStats, Tally
from colrow.collectives.typed import (
    AllGather,
    AllReduce,
    AllToAll,
    Assume,
    Collective,
    Enter,
    FirstRankOnly,
    Pad,
    PendingResult,
    ReduceScatter,
    Slice,
)

__all__ = [
    "AllGather",
    "AllReduce",
    "AllToAll",
    "Assume",
    "Call",
    "Collective",
    "CommStats",
    "Communicator",
    "Enter",
    "FirstRankOnly",
    "Group",
    "Pad",
    "Pending",
    "PendingResult",
    "ReduceScatter",
    "Slice",
    "Tally",
    "all_gather",
    "all_gather_async",
    "all_reduce",
    "all_reduce_async",
    "all_reduce_of",
    "all_to_all",
    "all_to_all_async",
    "comm_stats",
    "communicator",
    "enter",
    "first_rank_only",
    "reduce_scatter",
    "reduce_scatter_async",
    "reset_comm_stats",
    "slice_local",
]
