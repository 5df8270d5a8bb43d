"""Steps of a recorded program: arguments of attention and of losses, and the error that names a step."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F

from colrow.errors import PlanError
from colrow.sources import short_path
from colrow.trace.records import FunctionCall, Operation, Value

LOSSES = (F.cross_entropy, F.nll_loss)

REMEDY = (
    "With sequences cut over ranks (cp), the model may treat tokens one by one and through "
    "F.scaled_dot_product_attention without a mask, causal or not. Instead of a padding mask, mark the "
    "labels of padding as ignored."
)


def refusal(cause: str, step: FunctionCall | Operation, remedy: str = REMEDY) -> PlanError:
    """The error that names a step's module and line."""
    module = "" if step.module is None else step.module.path
    call = step if isinstance(step, FunctionCall) else step.call
    place = ""
    if call is not None:
        site = call.origin
        place = f" ({short_path(site.file)}:{site.line} in {site.code.co_name})"
    return PlanError(module, cause + place, remedy)


def inputs_behind(value: Value) -> set[str]:
    """Names of the arguments of the model from which a value is made."""
    found: set[str] = set()
    seen: set[int] = set()
    open_values = [value]
    while open_values:
        one = open_values.pop()
        if one.index in seen:
            continue
        seen.add(one.index)
        if one.source.kind == "input":
            found.add(one.source.name.split(".")[0])
        elif one.producer is not None:
            open_values += one.producer.inputs
    return found


def argument(call: FunctionCall, name: str) -> Any:
    """An argument of attention or of a loss, its default where it was not given."""
    signature = _SIGNATURES[call.name]
    bound = signature.bind(*call.arguments, **call.keywords)
    bound.apply_defaults()
    return bound.arguments[name]


def _attention_signature(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> None:
    """Arguments of the builtin, which has no signature."""


_SIGNATURES = {
    "scaled_dot_product_attention": inspect.signature(_attention_signature),
    **{function.__name__: inspect.signature(function) for function in LOSSES},
}
