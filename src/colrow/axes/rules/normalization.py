"""Normalisations: they mix the dimensions that they normalise over."""

from __future__ import annotations

from colrow.axes.context import RuleContext, positive
from colrow.axes.registry import rule


@rule("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm", "aten.layer_norm")
def layer_norm(op: RuleContext) -> None:
    """Statistics (further outputs) have ones for the normalised dimensions."""
    dimensions = op.dimensions("input")
    kept = len(dimensions) - len(op.argument("normalized_shape"))
    for factor in dimensions[kept:]:
        op.block(factor, "normalised over")
    for name in ("weight", "bias"):
        value = op.optional(name)
        if value is not None:
            for factor, tied in zip(dimensions[kept:], op.dimensions(value), strict=True):
                op.unify(factor, tied)
    op.set_output(dimensions)
    for index in range(1, len(op.outputs)):
        op.set_output([*dimensions[:kept], *(op.atom(1) for _ in dimensions[kept:])], index)


@rule("aten.native_group_norm")
def group_norm(op: RuleContext) -> None:
    """Channels are ``groups x channels of one group``; each group is normalised by itself."""
    value = op.dimensions("input")
    groups = int(op.argument("group"))
    text = "normalised over"
    parts = op.split(value[1], [groups, value[1].size // groups], text)
    if parts is not None:
        op.block(parts[1], text)
    for factor in value[2:]:
        op.block(factor, text)
    for name in ("weight", "bias"):
        tied = op.optional(name)
        if tied is not None:
            op.unify(value[1], op.dimensions(tied)[0])
    op.set_output(value)
    outer = parts[0] if parts is not None else op.blocked_atom(groups, text)
    for index in range(1, len(op.outputs)):
        op.set_output([value[0], outer], index)


@rule(
    "aten.native_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
    "aten._batch_norm_with_update",
    "aten._batch_norm_no_update",
)
def batch_norm(op: RuleContext) -> None:
    """Per channel; in training over all else. Statistics have one number per channel."""
    value = op.dimensions("input")
    if op.name not in ("aten._native_batch_norm_legit_no_training", "aten._batch_norm_no_update"):
        statistics = op.optional("running_mean")
        if statistics is None or op.argument("training", op.argument("train", True)):
            for index, factor in enumerate(value):
                if index != 1:
                    op.block(factor, "normalised over")
    for tied in op.inputs[1:]:
        op.unify(value[1], op.dimensions(tied)[0])
    op.set_output(value)
    for index, output in enumerate(op.outputs[1:], start=1):
        channels = output.shape == (value[1].size,)
        op.set_output([value[1]] if channels else op.atoms(output.shape), index)


@rule("aten._weight_norm_interface")
def weight_norm(op: RuleContext) -> None:
    """``v / |v| * g`` with one norm for each index of ``dim``; the norms are the second result."""
    direction, scale = op.dimensions("v"), op.dimensions("g")
    dimension = positive(op.argument("dim", 0), len(direction))
    for index, factor in enumerate(direction):
        if index != dimension:
            op.block(factor, "normalised over")
    op.unify(direction[dimension], scale[dimension])
    op.set_output(direction)
    op.set_output(scale, 1)
