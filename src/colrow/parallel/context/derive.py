"""What is done to a model so that each rank works on its tokens, from calls of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from colrow.axes import Registry
from colrow.errors import PlanError
from colrow.parallel.context.lengths import check_lengths
from colrow.parallel.context.names import positional_names
from colrow.parallel.context.plan import ContextPlan
from colrow.parallel.context.walk import plan_context
from colrow.plan.derive import record
from colrow.trace import Example, TraceError


def derive_context(
    model: nn.Module, examples: Mapping[str, Example], registry: Registry | None = None
) -> ContextPlan:
    """What has to be done for the calls of ``examples``, and for the same calls without targets of losses.

    A model that cannot be called without targets, or that then mixes tokens, can be called with them only.

    Args:
        model: real or on the meta device; not changed.
        examples: calls of the model by mode.
        registry: the rules of operators; see :func:`colrow.rule`.

    Raises:
        TraceError: if the model cannot be recorded.
        PlanError: if it mixes tokens, naming the module and the line.
    """
    trace = record(model, examples)
    plan = plan_context(model, trace, registry)
    check_lengths(model, examples, trace, plan)
    others = {
        f"{mode} without targets": other
        for mode, example in examples.items()
        if (other := _without(model, example, plan.targets)) is not None
    }
    if not others:
        return plan
    try:
        # a name of a mode says whether the model trains: its dropout does not change what mixes tokens
        return plan_context(model, record(model, {**examples, **others}), registry)
    except (PlanError, TraceError) as error:
        return replace(plan, without_targets=str(error))
    except Exception as error:  # whatever the program raises where it needs them
        return replace(plan, without_targets=f"{type(error).__name__}: {error}")


def _without(model: nn.Module, example: Example, targets: set[str]) -> Example | None:
    """The example without the arguments named so; ``None`` if it has none, or another comes after them."""
    names = positional_names(model.forward)[: len(example.arguments)]
    first = next((place for place, name in enumerate(names) if name in targets), len(example.arguments))
    if any(name not in targets for name in names[first:]):
        return None
    keywords = {name: item for name, item in example.keywords.items() if name not in targets}
    if first == len(example.arguments) and len(keywords) == len(example.keywords):
        return None
    return Example(example.arguments[:first], keywords)
