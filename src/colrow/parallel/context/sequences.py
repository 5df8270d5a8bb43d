"""What attention of a recorded model goes over."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from colrow.axes import Axes
from colrow.errors import PlanError
from colrow.parallel.context.steps import argument, refusal
from colrow.parallel.context.token_axis import TokenAxis
from colrow.plan.sequence.cut import parts_of
from colrow.trace.records import FunctionCall, ModuleCall, Trace, Value


def calls_of(trace: Trace, root: ModuleCall) -> Iterator[FunctionCall]:
    """The calls of a run."""
    return (call for call in trace.calls if root.first <= call.first < root.last)


def find_sequence(axes: Axes, root: ModuleCall) -> TokenAxis:
    """What attention of a run goes over.

    Raises:
        PlanError: if there is none, or more than one sequence.
    """
    found: TokenAxis | None = None
    for call in calls_of(axes.trace, root):
        if call.function is not F.scaled_dot_product_attention:
            continue
        query, key = (argument(call, name) for name in ("query", "key"))
        assert isinstance(query, Value)
        assert isinstance(key, Value)
        queries, keys = (parts_of(axes, axes.dimensions(one)[-2]) for one in (query, key))
        if queries is None or queries != keys:
            raise refusal("attention between two sequences", call)
        if found is not None and found.parts != queries:
            raise refusal("attention over another sequence than before", call)
        found = TokenAxis(axes, queries)
    if found is None:
        raise PlanError(
            root.path,
            "it does not call F.scaled_dot_product_attention, so that its sequences cannot be cut over "
            "ranks (cp)",
            "Write its attention with F.scaled_dot_product_attention(..., is_causal=True); models of "
            "transformers do if they are made with attn_implementation='sdpa'.",
        )
    if found.length < 2 or not found.atoms:
        raise PlanError(
            root.path, "the example's sequence is too short", "Give an example of at least 4 tokens."
        )
    return found
