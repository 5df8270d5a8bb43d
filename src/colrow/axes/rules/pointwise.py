"""Operators that work on each element by itself, with broadcasting."""

from __future__ import annotations

from colrow.axes.context import RuleContext
from colrow.axes.registry import rule


def elementwise(op: RuleContext) -> None:
    """All tensors are broadcast to the results, which have one shape."""
    dimensions = op.broadcast(op.inputs, op.outputs[0].shape)
    for output in range(len(op.outputs)):
        op.set_output(dimensions, output)


@rule()
def pointwise(op: RuleContext) -> None:
    """For all operators that PyTorch tags as pointwise and that no rule names."""
    elementwise(op)


@rule("aten.add", "aten.sub", "aten.rsub", "aten.where", linear=[("self", "other")])
def sums(op: RuleContext) -> None:
    elementwise(op)


@rule("aten.mul", linear=["self", "other"])
def mul(op: RuleContext) -> None:
    elementwise(op)


@rule("aten.div", linear=["self"])
def div(op: RuleContext) -> None:
    elementwise(op)


@rule("aten.div.Tensor_mode", "aten.div.Scalar_mode")
def rounded_div(op: RuleContext) -> None:
    elementwise(op)


@rule("aten.neg", "aten.positive", "aten.real", "aten.imag", linear=["self"])
def signs(op: RuleContext) -> None:
    elementwise(op)


@rule("aten.masked_fill", linear=[("self", "value")])
def masked_fill(op: RuleContext) -> None:
    elementwise(op)


@rule("aten.addcmul", linear=[("self", "tensor1"), ("self", "tensor2")])
def addcmul(op: RuleContext) -> None:
    elementwise(op)


@rule("aten.addcdiv", linear=[("self", "tensor1")])
def addcdiv(op: RuleContext) -> None:
    elementwise(op)


@rule(
    "aten.max.other",
    "aten.min.other",
    "aten.hardswish",
    "aten._prelu_kernel",
    "aten.polar",
    "aten.complex",
    "aten.fill",
    "aten.zero",
    "aten.floor_divide",
    "aten.clamp",
)
def named(op: RuleContext) -> None:
    """Pointwise, whatever their tags."""
    elementwise(op)


@rule("aten.log_sigmoid_forward")
def log_sigmoid(op: RuleContext) -> None:
    """The second result is a buffer, on some devices empty."""
    op.set_same("self")


@rule("aten.isin", "aten.bucketize", "aten.searchsorted")
def compared(op: RuleContext) -> None:
    """Each element of one tensor is compared with the whole of another."""
    names = {"aten.isin": ("elements", "test_elements"), "aten.bucketize": ("self", "boundaries")}
    value, whole = names.get(op.name, ("self", "sorted_sequence"))
    found = op.optional(whole)
    if found is not None:
        op.block_dimensions(found, range(len(found.shape)), "compared with as a whole")
    given = op.optional(value)
    same = given is not None and given.shape == op.outputs[0].shape
    op.set_output(op.dimensions(given) if same and given is not None else op.atoms(op.outputs[0].shape))


@rule(
    "aten.native_dropout",
    "aten.rrelu_with_noise",
    "aten.random",
    "aten.log_normal",
    "aten.geometric",
    "aten.cauchy",
    "aten.bernoulli",
    "aten.uniform",
    "aten.normal",
    "aten.exponential",
    random=True,
)
def random(op: RuleContext) -> None:
    elementwise(op)
