"""Making process groups, so that ranks which cannot agree on one fail with the cause instead of waiting."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    PrefixStore,
    _get_default_store,
    _new_process_group_helper,
)

from colrow.collectives.pending import Step
from colrow.collectives.statistics import Call, current_phase

MEETINGS = "colrow/meetings"


def check_members(ranks: Sequence[int], rank: int, size: int) -> tuple[int, ...]:
    """The ranks of a subgroup, of a group of ``size`` in which this process is ``rank``.

    Raises:
        ValueError: if this rank is not a member, or a rank is named twice or is not in the group.
    """
    members = tuple(ranks)
    if rank not in members or len(set(members)) != len(members):
        raise ValueError(f"rank {rank} cannot make the subgroup {list(members)}: name it once")
    if not set(members) <= set(range(size)):
        raise ValueError(f"the subgroup {list(members)} has ranks outside of 0 to {size - 1}")
    return members


def make_subgroup(parent: dist.ProcessGroup, device: str, global_ranks: Sequence[int]) -> dist.ProcessGroup:
    """A process group among some ranks of ``parent``, in this order; only these call it.

    Its name, by which its members find each other, follows from its parent's and the members alone.
    ``dist.new_group`` counts the groups that a rank has made, so that ranks which have made different
    numbers of them never meet.

    Args:
        parent: whose backend and timeout the group gets.
        device: of its tensors.
        global_ranks: job-wide ranks of the members.

    Raises:
        RankFailure: if another member died, raised or did not come within the timeout.
    """
    members = list(global_ranks)
    name: Any = f"{parent.group_name}/{'_'.join(map(str, members))}"
    call = Call("new_group", f"ranks {', '.join(map(str, members))}", current_phase(), 0)
    made: list[dist.ProcessGroup] = []

    def make() -> None:
        group, _ = _new_process_group_helper(
            len(members),
            members.index(dist.get_rank()),
            members,
            dist.Backend(dist.get_backend(parent)),
            _get_default_store(),
            name,
            timeout=parent._get_backend(torch.device(device)).options._timeout,
        )
        made.append(group)

    Step(call, members).wait(make)
    (group,) = made
    dist.distributed_c10d._world.pg_group_ranks[group] = {one: rank for rank, one in enumerate(members)}
    return group


def require_agreement(
    operation: str, own: dict[str, object], limit: timedelta, explain: Callable[[str], str]
) -> None:
    """Check that all ranks of the job are about to make the same process groups; collective.

    Args:
        operation: which function asks, for errors.
        own: what has to be the same on all ranks, by name; numbers and texts.
        limit: how long to wait for the others.
        explain: what the user can do about the name that differs.

    Raises:
        ValueError: if something differs; on all ranks.
        RankFailure: if another rank died, raised or did not come within the limit.
    """
    size = dist.get_world_size()
    told: list[dict[str, object]] = []
    step = Step(Call(operation, "", current_phase(), 0), range(size))
    step.wait(lambda: told.extend(_tell_all(operation, own, limit)))
    for name in own:
        ranks_by_value: dict[object, list[int]] = {}
        for rank, theirs in enumerate(told):
            ranks_by_value.setdefault(theirs.get(name), []).append(rank)
        if len(ranks_by_value) > 1:
            values = "; ".join(
                f"{value} on {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))}"
                for value, ranks in ranks_by_value.items()
            )
            raise ValueError(f"{operation}: the ranks do not agree on {name} ({values}). {explain(name)}")


def _tell_all(name: str, own: dict[str, object], limit: timedelta) -> list[dict[str, object]]:
    """What all ranks say, in rank order: the first rank collects it in the job's key-value store."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = PrefixStore(f"{MEETINGS}/{name}", _get_default_store())
    meeting = PrefixStore(str(store.add(f"of rank {rank}", 1)), store)
    meeting.set(str(rank), json.dumps(own))
    if rank == 0:
        keys = [str(other) for other in range(size)]
        meeting.wait(keys, limit)
        meeting.set("all", json.dumps([json.loads(text) for text in meeting.multi_get(keys)]))
    else:
        meeting.wait(["all"], limit)
    told: list[dict[str, object]] = json.loads(meeting.get("all"))
    return told
