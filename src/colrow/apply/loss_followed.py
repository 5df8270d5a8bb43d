"""What models do with late logits before their loss, followed without numbers.

Each function here gives ``None`` where numbers are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from colrow.apply.loss_late import Cast, Late, made_from
from colrow.apply.loss_tensor import Call, LocalLogits
from colrow.apply.nesting import leaves, mapped

# the same elements in the same order, in a shape that arguments may give
SHAPES = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel",
}  # fmt: skip
_CASTS = {"float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16}

Rule = Callable[[Call], Any]
"""Gives the result of a call with logits that have numbers."""


def followed_part(call: Call, rule: Rule) -> Any:
    """The result of a function that gives some of the rows, or other shapes."""
    found = _late_operand(call)
    # view(dtype) gives other elements
    if found is None or any(isinstance(one, torch.dtype) for one in leaves((call.args, call.kwargs))):
        return None
    operand, late = found
    of_rows = call
    if any(isinstance(one, Tensor) and one is not operand for one in leaves((call.args, call.kwargs))):
        # as they are now: what selects rows may be written into later
        call = _with_others(call, lambda one: one.clone())
        of_rows = _with_others(call, lambda one: _beside(one, late.rows))
    result = rule(of_rows.of(LocalLogits.of(late.rows, operand.vocabulary, operand.dimension)))
    # nearly always it is one tensor
    parts, structure = ([result], None) if isinstance(result, LocalLogits) else tree_flatten(result)
    width = operand.outside.shape[operand.dimension]
    results = []
    for index, leaf in enumerate(parts):
        shape = list(leaf.plain.shape)
        shape[leaf.dimension] = width
        results.append(
            made_from(
                operand,
                _again(call, rule, index),
                tuple(shape),
                leaf.dimension,
                operand.outside.dtype,
                leaf.plain,
                late.changes,
                call.name in SHAPES,
            )
        )
    return results[0] if structure is None else tree_unflatten(results, structure)


def _beside(one: Tensor, rows: Tensor) -> Tensor:
    """Where ``rows`` are; masks on the CPU, for how much they select depends on their values."""
    return one.cpu() if one.dtype in (torch.bool, torch.uint8) else one.to(rows.device)


def followed_same(call: Call, rule: Rule) -> LocalLogits | None:
    """The result of a function that copies or casts."""
    found = _late_operand(call)
    if found is None or call.name in ("detach", "data"):
        return None
    outside = found[0].outside
    if len(call.args) == 1 and not call.kwargs and _CASTS.get(call.name) == outside.dtype:
        return found[0]  # as torch gives the tensor itself
    result = _tried(call, outside)
    if result is None or result.device != outside.device:
        return None
    return followed_cast(call, rule, result.dtype)


def followed_cast(call: Call, rule: Rule, dtype: torch.dtype | None) -> LocalLogits | None:
    """The result of a function that gives the same numbers, in ``dtype`` if that is not ``None``."""
    found = _late_operand(call)
    if found is None:
        return None
    operand, late = found
    before, changes = operand.outside.dtype, late.changes
    if dtype is not None and dtype != before:
        changes = (*changes, Cast(dtype, before == torch.bfloat16 and dtype == torch.float32))
    rows = late.rows.contiguous() if call.name in ("contiguous", "clone") else late.rows
    return _changed(call, rule, operand, dtype or before, rows, changes)


def followed_change(call: Call, rule: Rule) -> LocalLogits | None:
    """The result of arithmetic with plain numbers."""
    found = _late_operand(call)
    tensors = [one for one in leaves((call.args, call.kwargs)) if isinstance(one, Tensor)]
    if found is None or len(tensors) > 1:
        return None
    operand, late = found
    result = _tried(call, operand.outside)
    if result is None:
        return None

    def change(values: Tensor) -> Tensor:
        changed: Tensor = call.of(values).run(lambda one: one)
        return changed

    return _changed(call, rule, operand, result.dtype, late.rows, (*late.changes, change))


def rows_of_loss(logits: LocalLogits, target: Tensor, reduction: str) -> Tensor | None:
    """Like ``target``, of which token each of late logits is; their vocabulary may be in any dimension."""
    late = logits.late
    if late is None or not late.origin.is_late or reduction == "none":
        return None
    rows = late.rows.select(logits.dimension, 0)
    return rows if rows.shape == target.shape else None


def _late_operand(call: Call) -> tuple[LocalLogits, Late] | None:
    """The only logits of a call and their numbers, if these are late."""
    (operand, *others) = call.logits
    late = operand.late
    if others or call.operand is not operand or late is None or not late.origin.is_late:
        return None
    return operand, late


def _changed(
    call: Call,
    rule: Rule,
    operand: LocalLogits,
    dtype: torch.dtype,
    rows: Tensor,
    changes: tuple[Callable[[Tensor], Tensor], ...],
) -> LocalLogits | None:
    if dtype == torch.float16:  # in which the loss's small gradients would vanish
        return None
    shape = tuple(operand.outside.shape)
    return made_from(operand, _again(call, rule, 0), shape, operand.dimension, dtype, rows, changes)


def _again(call: Call, rule: Rule, index: int) -> Callable[[Tensor], Tensor]:
    """One of the results of a call with its only logits replaced by such with numbers."""
    (operand,) = call.logits
    vocabulary, dimension = operand.vocabulary, operand.dimension

    def again(numbers: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            results = leaves(rule(call.of(LocalLogits.of(numbers, vocabulary, dimension))))
            made: LocalLogits = results[index]
            return made.plain

    return again


def _with_others(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """The call with its tensors other than logits changed."""

    def changed(one: Any) -> Any:
        return change(one) if isinstance(one, Tensor) and not isinstance(one, LocalLogits) else one

    args, kwargs = mapped(changed, (call.args, call.kwargs))
    return Call(call.function, call.name, args, kwargs, call.logits)


def _tried(call: Call, outside: Tensor) -> Tensor | None:
    """The function's result for no elements, which has the dtype and device; ``None`` if there are none."""
    result = call.of(outside.new_empty([0] * outside.dim())).run(lambda one: one)
    return result if isinstance(result, Tensor) and result.is_floating_point() else None
