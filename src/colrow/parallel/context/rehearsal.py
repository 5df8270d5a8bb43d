"""Which numbers a program computes on one rank of those whose sequences are cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from colrow.apply.dry_run import DryRanks
from colrow.localise.arguments import plain_numbers
from colrow.parallel.context.apply import change_calls
from colrow.parallel.context.door import Rehearsal
from colrow.parallel.context.plan import ContextPlan
from colrow.parallel.context.running import Running
from colrow.plan.places import Path
from colrow.trace import Example, trace_together
from colrow.trace.meta import meta_copy

Numbers = list[tuple[Path, float]]
"""The numbers among a call's arguments of which is not known where they come from."""

RANKS = 2


def rehearsed_numbers(
    model: nn.Module, examples: Mapping[str, Example], plan: ContextPlan
) -> dict[object, Numbers]:
    """The numbers that the first of two ranks gives to calls, by the calls' places.

    The model is recorded on the meta device with what ``plan`` says done to it, but for attention, which each
    rank computes of its own tokens. Empty if that cannot be done.
    """
    copy, originals = meta_copy(model)
    running = Running(DryRanks(0, RANKS), "ulysses", "contiguous")
    change_calls(copy, replace(plan, attentions=set()), running)
    Rehearsal(copy, plan, running).attach()
    try:
        trace = trace_together(copy, examples, routing="guess", originals=originals)
    except Exception:  # whatever it is, it is known of no number then that it is right
        return {}
    return {call.place: plain_numbers(call) for call in trace.calls}
