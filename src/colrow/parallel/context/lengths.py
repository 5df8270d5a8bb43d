"""Numbers that depend on the length of a sequence and do not show it.

Sizes remember where they come from, but ``len(x)`` and ``1.0 / x.shape[1]`` leave plain numbers. They show
when the model is recorded once more, with shorter sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from colrow.errors import PlanError
from colrow.localise.arguments import plain_numbers
from colrow.parallel.context.names import positional_names
from colrow.parallel.context.plan import ContextPlan
from colrow.parallel.context.rehearsal import Numbers, rehearsed_numbers
from colrow.plan.derive import record
from colrow.plan.places import Path
from colrow.sources import short_path
from colrow.trace import Example, Trace
from colrow.trace.records import FunctionCall

_REMEDY = (
    "With sequences cut over ranks (cp), a rank would compute it from its own tokens: compute it from a "
    "number that is not a size of sequences."
)


def check_lengths(
    model: nn.Module,
    examples: Mapping[str, Example],
    trace: Trace,
    plan: ContextPlan,
) -> None:
    """Refuse what computes with the length of its sequences behind the back of the recorder.

    But where a rank computes it from gathered tokens, so that it is what it was.

    Args:
        model: as recorded.
        examples: calls of it.
        trace: of these.
        plan: what is to be done to the model.

    Raises:
        PlanError: naming the module and the line.
    """
    dimensions = plan.lengths
    if any(len(path) > 1 for path in dimensions):
        return  # such arguments belong to the caller
    try:
        other = record(model, {mode: _shorter(model, one, dimensions) for mode, one in examples.items()})
    except Exception:  # whatever it is, it says nothing about the length that was given
        return
    on_a_rank: dict[object, Numbers] | None = None
    for call, shorter in zip(trace.calls, other.calls, strict=False):
        if call.site != shorter.site:
            raise _error("the program takes another way for another length", call)
        if plain_numbers(call) == plain_numbers(shorter):
            continue
        if on_a_rank is None:
            on_a_rank = rehearsed_numbers(model, examples, plan) if plan.gathered else {}
        if on_a_rank.get(call.place) != plain_numbers(call):
            raise _error(f"{call.name} is given a number that depends on the length", call)
    if len(trace.calls) != len(other.calls):
        longer = trace if len(trace.calls) > len(other.calls) else other
        raise _error("the program takes another way for another length", longer.calls[-1])


def _error(cause: str, call: FunctionCall) -> PlanError:
    place = f"{short_path(call.origin.file)}:{call.origin.line} in {call.origin.code.co_name}"
    return PlanError(call.module.path, f"{cause} ({place})", _REMEDY)


def _shorter(model: nn.Module, example: Example, dimensions: Mapping[Path, tuple[int, ...]]) -> Example:
    """The example with a token less in each sequence."""
    names = positional_names(model.forward)

    def cut(name: str, item: Any) -> Any:
        for dimension in dimensions.get((name,), ()):
            if isinstance(item, Tensor):
                item = item.narrow(dimension, 0, item.shape[dimension] - 1)
        return item

    given = [cut(name, item) for name, item in zip(names, example.arguments, strict=False)]
    rest = example.arguments[len(given) :]
    return Example((*given, *rest), {name: cut(name, item) for name, item in example.keywords.items()})
