"""Operators that make tensors from nothing, or from the shape of another."""

from __future__ import annotations

from colrow.axes.context import RuleContext
from colrow.axes.registry import rule


@rule(
    "aten.arange",
    "aten.linspace",
    "aten.logspace",
    "aten.eye",
    "aten.tril_indices",
    "aten.triu_indices",
    "aten.hann_window",
    "aten.hamming_window",
    "aten.blackman_window",
    "aten.bartlett_window",
    "aten.kaiser_window",
)
def iota(op: RuleContext) -> None:
    """The content depends on the index: a rank's part is not what the operator gives for the local size."""
    dimensions = op.atoms(op.outputs[0].shape)
    for factor in dimensions:
        op.iota(factor)
    op.set_output(dimensions)


@rule("aten.randperm")
def permutation(op: RuleContext) -> None:
    op.block_all("a random permutation")


@rule(
    "aten.zeros",
    "aten.ones",
    "aten.full",
    "aten.empty",
    "aten.empty_strided",
    "aten.scalar_tensor",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
    "aten.new_empty_strided",
)
def constant(op: RuleContext) -> None:
    op.set_output(op.atoms(op.outputs[0].shape))


@rule("aten.rand", "aten.randn", "aten.randint", random=True)
def random(op: RuleContext) -> None:
    op.set_output(op.atoms(op.outputs[0].shape))


@rule("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like")
def constant_like(op: RuleContext) -> None:
    op.set_output(op.dimensions("self"))


@rule("aten.rand_like", "aten.randn_like", "aten.randint_like", random=True)
def random_like(op: RuleContext) -> None:
    op.set_output(op.dimensions("self"))
