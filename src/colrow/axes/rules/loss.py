"""The operators of a cross-entropy.

Its classes can be cut, if a loss over cut classes takes the place of ``log_softmax`` and ``nll_loss``: that
needs only a maximum and a sum of one number per token. The rules mark the classes for that.
"""

from __future__ import annotations

from colrow.axes.context import RuleContext, positive
from colrow.axes.registry import rule
from colrow.trace.records import Operation

_LOSSES = ("aten.nll_loss_forward", "aten.nll_loss2d_forward", "aten.nll_loss", "aten.nll_loss_nd")
_COPIES = ("aten.view", "aten._unsafe_view", "aten.clone", "aten._to_copy")


@rule("aten._log_softmax", "aten.log_softmax")
def log_softmax(op: RuleContext) -> None:
    """Its classes are marked if only losses read the result, and blocked if anything else does."""
    dimensions = op.dimensions("self")
    dimension = positive(op.argument("dim"), len(dimensions))
    if dimensions:
        uses = op.outputs[0].uses
        if uses and all(_is_loss(use, dimension) for use in uses):
            op.classes(dimensions[dimension])
        else:
            op.block(dimensions[dimension], "log_softmax over it")
    op.set_output(dimensions)


def _is_loss(use: Operation, dimension: int) -> bool:
    """Whether ``use`` is a negative log-likelihood, or the sum over classes of label smoothing.

    Or a copy, or a view that leaves the classes and all before or all after them, of which all uses are so.
    ``dimension`` is that of the classes.
    """
    if use.name in _LOSSES:
        return True
    if not use.outputs or not use.inputs:
        return False
    shape, result = use.inputs[0].shape, use.outputs[0].shape
    if use.name == "aten.sum":
        summed = use.arguments[1] if len(use.arguments) > 1 else None
        return [positive(given, len(shape)) for given in summed or []] == [dimension]
    uses = use.outputs[0].uses
    if use.name not in _COPIES or not uses:
        return False
    after = dimension
    if shape[: dimension + 1] != result[: dimension + 1]:
        after = len(result) - (len(shape) - dimension)
        if after < 0 or shape[dimension:] != result[after:]:
            return False
    return all(_is_loss(one, after) for one in uses)


@rule("aten.nll_loss_forward", "aten.nll_loss2d_forward")
def nll_loss(op: RuleContext) -> None:
    """``self [tokens, classes, places...]`` and ``target [tokens, places...]``.

    The loss is summed over tokens unless it is averaged (``reduction`` 1), which needs all of them.
    """
    value, target = op.dimensions("self"), op.dimensions("target")
    at = 0 if len(value) == 1 else 1
    op.classes(value[at])
    weight = op.optional("weight")
    if weight is not None:
        op.unify(value[at], op.dimensions(weight)[0])
    tokens = [factor for index, factor in enumerate(value) if index != at]
    for factor, tied in zip(tokens, target, strict=False):
        op.unify(factor, tied)
    reduction = int(op.argument("reduction", 1))
    if reduction == 0:
        op.set_output(tokens if op.outputs[0].shape else [])
    else:
        op.set_output([])
        for factor in tokens:
            if reduction == 1:
                op.block(factor, "averaged over")
            else:
                op.contract(factor)
    for index in range(1, len(op.outputs)):
        op.set_output([], index)


@rule(
    "aten.mse_loss",
    "aten.smooth_l1_loss",
    "aten.huber_loss",
    "aten.soft_margin_loss",
    "aten.binary_cross_entropy",
    "aten.binary_cross_entropy_with_logits",
)
def pointwise_loss(op: RuleContext) -> None:
    """A loss of each element by itself: kept (``reduction`` 0), averaged (1) or summed (2)."""
    values = op.inputs
    shape = max((value.shape for value in values), key=len)
    dimensions = op.broadcast(values, shape)
    reduction = int(op.argument("reduction", 1))
    op.set_output([] if reduction else dimensions)
    for factor in dimensions:
        if reduction == 1:
            op.block(factor, "averaged over")
        elif reduction == 2:
            op.contract(factor)
