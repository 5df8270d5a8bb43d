"""Convolutions: channels are contracted like features, positions mix."""

from __future__ import annotations

from colrow.axes.context import RuleContext
from colrow.axes.factor import Factor
from colrow.axes.registry import rule


@rule(
    "aten.convolution",
    "aten._convolution",
    linear=[("input", "bias"), ("weight", "bias")],
    addends=["bias"],
)
def convolution(op: RuleContext) -> None:
    """``input [batch, channels, positions...]``, ``weight [out, in / groups, kernel...]``.

    Transposed, the weight is ``[in, out / groups, kernel...]``. Channels are ``groups x channels of one
    group``: groups are kept, the channels of a group contracted.
    """
    value, weight = op.dimensions("input"), op.dimensions("weight")
    if len(value) != len(weight):
        op.block_all("a convolution without a batch dimension")
        return
    for factor in weight[2:]:
        op.block(factor, "a convolution's kernel")
    groups = int(op.argument("groups", 1))
    channels = _channels(op, value[1], weight, groups, bool(op.argument("transposed", False)))
    kernel, shape = op.value("weight").shape[2:], op.outputs[0].shape
    places: list[Factor] = []
    for index, factor in enumerate(value[2:]):
        size = shape[2 + index]
        if kernel[index] == 1 and size == factor.size and _plain(op, index):
            places.append(factor)
        else:
            op.block(factor, "a convolution over it")
            places.append(op.blocked_atom(size, "a convolution over it"))
    op.set_output([value[0], channels, *places])
    bias = op.optional("bias")
    if bias is not None:
        op.unify(op.dimensions(bias)[0], op.dimensions(op.outputs[0])[1])


def _plain(op: RuleContext, index: int) -> bool:
    """Whether a kernel of one position is moved by one position at a time, without padding."""
    stride, padding = (list(op.argument(name)) for name in ("stride", "padding"))
    return stride[index % len(stride)] == 1 and padding[index % len(padding)] == 0


def _channels(
    op: RuleContext, value: Factor, weight: tuple[Factor, ...], groups: int, transposed: bool
) -> Factor:
    """Tie input channels and weight; the output's channels."""
    text = "channels across groups"
    if groups == 1:
        inside, outside = weight[:2] if transposed else weight[1::-1]
        op.unify(value, inside)
        op.contract(value)
        return outside
    parts = op.split(value, [groups, value.size // groups], text)
    split = op.split(weight[0], [groups, weight[0].size // groups], text)
    if parts is None or split is None:
        for factor in (value, *weight[:2]):
            op.block(factor, text)
        size = weight[1].size * groups if transposed else weight[0].size
        return op.blocked_atom(size, text)
    op.unify(parts[0], split[0])
    op.unify(parts[1], split[1] if transposed else weight[1])
    op.contract(parts[1])
    return op.factors.product([split[0], weight[1]]) if transposed else weight[0]
