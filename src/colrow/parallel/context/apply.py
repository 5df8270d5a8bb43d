"""Changing a model so that each rank of ``cp`` works on its tokens, in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from colrow.apply.calls import CallTable
from colrow.collectives import Communicator
from colrow.errors import PlanError
from colrow.parallel.context.attention import Method
from colrow.parallel.context.calls import AttentionOverRanks, LossOverRanks
from colrow.parallel.context.door import Door
from colrow.parallel.context.plan import ContextPlan
from colrow.parallel.context.running import Running

Wish = Literal["auto", "ulysses", "ring"]


def method_of(plan: ContextPlan, ranks: int, tensor_ranks: int, wish: Wish) -> Method:
    """How ranks attend to each other's keys.

    Args:
        plan: of the model.
        ranks: over which sequences are cut.
        tensor_ranks: over which heads are.
        wish: the caller's.

    Raises:
        ValueError: if there is no such method.
        PlanError: if it cannot be.
    """
    if wish not in get_args(Wish):
        raise ValueError(f"context must be 'auto', 'ulysses' or 'ring', not {wish!r}")
    groups = plan.groups // tensor_ranks
    method: Method = "ring" if wish == "ring" or (wish == "auto" and groups < ranks) else "ulysses"
    if method == "ulysses" and groups < ranks:
        raise PlanError(
            min(at.module for at in plan.attentions),
            f"a rank has {groups} key-value heads, too few to give each of {ranks} ranks one (Ulysses)",
            "Use context='ring', or cut sequences over fewer ranks (cp).",
        )
    if method == "ring" and plan.drops is not None:
        raise PlanError(
            plan.drops.module,
            f"attention drops weights ({plan.drops.call}), which ring attention cannot do",
            "Set the dropout of attention to 0, or cut sequences over as many ranks (cp) as there are "
            "key-value heads at most.",
        )
    return method


def apply_context(model: nn.Module, plan: ContextPlan, ranks: Communicator, method: Method) -> None:
    """Do what ``plan`` says to ``model``, whose weights may have been cut before.

    Args:
        ranks: the group over which sequences are cut.
        method: see :func:`method_of`.
    """
    order: Literal["zigzag", "contiguous"] = "zigzag" if method == "ring" and plan.is_causal else "contiguous"
    running = Running(ranks, method, order)
    change_calls(model, plan, running)
    Door(model, plan, running).attach()


def change_calls(model: nn.Module, plan: ContextPlan, running: Running) -> None:
    """Change the calls within ``model``, so that it can be run on a rank's tokens."""
    calls = CallTable(model)
    for number in plan.numbers:
        calls.at(number.at.module).at(number.at.call).integers.append((number.path, _whole(running)))
    for last in plan.last_tokens:
        calls.at(last.at.module).at(last.at.call).integers.append((last.path, _to_the_end))
    for taken in plan.taken:
        changes = calls.at(taken.at.module).at(taken.at.call)
        places = changes.results if taken.is_result else changes.arguments
        places.append((taken.path, partial(running.take, extent=taken.extent)))
    for gathered in plan.gathered:
        label = f"gather tokens for {gathered.at.call.function}"
        change = partial(running.join, extent=gathered.extent, label=label)
        calls.at(gathered.at.module).at(gathered.at.call).arguments.append((gathered.path, change))
    for at in plan.attentions:
        calls.at(at.module).at(at.call).replacement = AttentionOverRanks(running, at)
    for loss in plan.losses:
        calls.at(loss.at.module).at(loss.at.call).replacement = LossOverRanks(running, loss)
    calls.attach()


def _to_the_end(number: Any) -> None:
    """Where a slice ends that leaves out no token."""


def _whole(running: Running) -> Callable[[Any], Any]:
    """A change of a number that counts a rank's tokens to one that counts all."""

    def change(number: Any) -> Any:
        share = running.share
        return number - share.counts[running.ranks.rank] + share.length

    return change
