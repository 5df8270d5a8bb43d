"""torch's schedules by name, and on which ranks their stages lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from colrow.errors import PlanError


@dataclass(frozen=True)
class Kind:
    """A schedule.

    Attributes:
        make: its class.
        single: whether it takes one stage in place of a list of them.
        per_rank: how many stages each rank has, unless the user says; ``None``: one.
        is_v: whether the order of ranks turns at the last: the first rank has the first and the last stage.
        fixed: whether the number of stages of a rank cannot be chosen.
        splits: whether it divides backward passes into those of inputs and those of weights.
    """

    make: Callable[..., Any]
    single: bool = False
    per_rank: int = 1
    is_v: bool = False
    fixed: bool = False
    splits: bool = False


_KINDS = {
    "gpipe": Kind(ScheduleGPipe, single=True, fixed=True),
    "1f1b": Kind(Schedule1F1B, single=True, fixed=True),
    "looped_bfs": Kind(ScheduleLoopedBFS, per_rank=2),
    "interleaved_1f1b": Kind(ScheduleInterleaved1F1B, per_rank=2),
    "interleaved_zero_bubble": Kind(ScheduleInterleavedZeroBubble, per_rank=2, splits=True),
    "zbv": Kind(ScheduleZBVZeroBubble, per_rank=2, is_v=True, fixed=True, splits=True),
}


def schedule_kind(name: str) -> Kind:
    """The schedule of a name.

    Raises:
        PlanError: if there is none.
    """
    if name not in _KINDS:
        raise PlanError("", f"there is no schedule {name!r}", f"Choose one of {', '.join(_KINDS)}.")
    return _KINDS[name]


def ranks_of_stages(kind: Kind, ranks: int, stages_per_rank: int | None) -> tuple[int, ...]:
    """By stage, the rank along ``pp`` that computes it.

    Raises:
        PlanError: if the schedule cannot have so many stages.
    """
    count = kind.per_rank if stages_per_rank is None else stages_per_rank
    if count < 1 or (kind.fixed and count != kind.per_rank):
        raise PlanError(
            "",
            f"this schedule has {kind.per_rank} stages on each rank, not {count}"
            if kind.fixed
            else f"a rank cannot have {count} stages",
            "Leave stages_per_rank out, or choose interleaved_1f1b.",
        )
    rows = []
    for row in range(count):
        backwards = kind.is_v and row % 2 == 1
        rows += list(range(ranks))[:: -1 if backwards else 1]
    return tuple(rows)


def idle_share(kind: Kind, ranks: int, stages_per_rank: int, micro_batches: int) -> float | None:
    """The share of a step in which a rank has nothing to do, if all stages and passes cost the same.

    (p - 1) / (v m + p - 1), Narayanan et al. 2021, https://arxiv.org/abs/2104.04473. ``None`` for schedules
    that divide backward passes: they fill most of it with gradients of weights (Qi et al. 2023,
    https://arxiv.org/abs/2401.10241).
    """
    if kind.splits:
        return None
    return (ranks - 1) / (stages_per_rank * micro_batches + ranks - 1)
