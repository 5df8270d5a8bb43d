"""Users' own rules, operators without a rule, and wrong rules that brute force finds."""

from __future__ import annotations

import pytest
import torch

from colrow.axes import Registry, RuleContext, default_registry, infer, rule
from colrow.layout.cut import Cut
from tests.axes.brute_force import Case, check_cuts, check_linear, record


def even(units: int) -> Cut:
    return Cut.balanced(units, 2)


def test_an_operator_without_rule_is_blocked_and_reported() -> None:
    trace, _, _ = record(Case(torch.ops.aten.erfinv.default, [torch.rand(3, 4)]))
    axes = infer(trace, Registry([]))
    assert list(axes.unknown) == ["aten.erfinv"]
    assert [axis.legal for axis in axes.all] == [False] * 4
    assert "no rule for this operator" in str(axes.all[0].illegal[0])
    assert "no rule for aten.erfinv (1 times)" in str(axes)


@pytest.mark.parametrize("name", ["abs_", "gelu_", "mish_", "xlogy_", "relu_", "mul_", "squeeze_"])
def test_in_place_variants_have_the_rule_of_the_original(name: str) -> None:
    packets = (getattr(torch.ops.aten, each) for each in (name, name.rstrip("_")))
    rules = [default_registry().find(getattr(packet, packet.overloads()[0])) for packet in packets]
    assert rules[0] is not None
    assert rules[0].function is rules[1].function


def test_a_users_rule_overrides_and_leaves_the_default_alone() -> None:
    @rule("aten.flip", linear=["self"])
    def flip(op: RuleContext) -> None:
        op.set_output([op.blocked_atom(size, "my rule") for size in op.outputs[0].shape])

    default = default_registry()
    extended = default.extended(flip)
    flipped = torch.ops.aten.flip.default
    assert extended.find(flipped) is not None
    assert extended.find(flipped) != default.find(flipped)
    assert len(extended) == len(default)
    trace, _, _ = record(Case(flipped, [torch.rand(3, 4), [0]]))
    assert {reason.text for axis in infer(trace, extended).all for reason in axis.illegal} >= {"my rule"}


@pytest.mark.parametrize("name", ["softmax", "aten.add_", "a.b.c.d"])
def test_a_wrong_name_is_told(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of an operator"):
        rule(name)


def test_a_rule_with_wrong_sizes_is_told() -> None:
    @rule("aten.t")
    def t(op: RuleContext) -> None:
        op.set_output(op.dimensions("self"))

    trace, _, _ = record(Case(torch.ops.aten.t.default, [torch.rand(3, 4)]))
    with pytest.raises(ValueError, match=r"aten\.t gave output 0 the sizes"):
        infer(trace, default_registry().extended(t))


def test_brute_force_finds_a_dimension_that_was_not_blocked() -> None:
    @rule("aten._softmax")
    def softmax(op: RuleContext) -> None:
        op.set_same("self")

    case = Case(torch.ops.aten._softmax.default, [torch.randn(4, 6, dtype=torch.float64), 1, False])
    with pytest.raises(AssertionError, match="not close"):
        check_cuts(case, even, default_registry().extended(softmax))


def test_brute_force_finds_a_bias_that_is_added_twice() -> None:
    @rule("aten.addmm")
    def addmm(op: RuleContext) -> None:
        rows, inner = op.dimensions("mat1")
        op.unify(inner, op.dimensions("mat2")[0])
        op.contract(inner)
        op.set_output([rows, op.dimensions("mat2")[1]])
        op.unify(op.dimensions("self")[0], op.dimensions("mat2")[1])

    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((5,), (3, 4), (4, 5))]
    case = Case(torch.ops.aten.addmm.default, tensors)
    check_cuts(case, even, default_registry())
    with pytest.raises(AssertionError, match="not close"):
        check_cuts(case, even, default_registry().extended(addmm))


def test_brute_force_finds_a_rule_that_is_not_linear() -> None:
    @rule("aten.relu", linear=["self"])
    def relu(op: RuleContext) -> None:
        op.set_same("self")

    case = Case(torch.ops.aten.relu.default, [torch.randn(4, 6, dtype=torch.float64)])
    with pytest.raises(AssertionError):
        check_linear(case, default_registry().extended(relu))


def test_a_contraction_over_parts_that_stay_whole_is_illegal() -> None:
    """``cat([a, b]) @ w`` cut along ``a`` alone would count ``b`` on every rank."""
    first, _, _ = record(Case(torch.ops.aten.cat.default, [[torch.rand(2, 3), torch.rand(2, 4)], 1]))
    joined = first.operations[0].outputs[0]
    second, _, _ = record(Case(torch.ops.aten.mm.default, [torch.rand(2, 7), torch.rand(7, 5)]))
    product = second.operations[0]
    _, weight = product.inputs
    for value in (weight, *product.outputs):
        value.index = len(first.values)
        first.values.append(value)
    product.index, product.arguments, product.inputs = 1, (joined, weight), (joined, weight)
    first.operations.append(product)
    axes = infer(first)
    three = next(axis for axis in axes.all if axis.size == 3)
    assert any("parts that would stay whole" in reason.text for reason in three.illegal)


def test_results_do_not_depend_on_the_run() -> None:
    case = Case(
        torch.ops.aten.baddbmm.default, [torch.rand(2, 3, 5), torch.rand(2, 3, 4), torch.rand(2, 4, 5)]
    )
    assert len({str([repr(axis) for axis in infer(record(case)[0]).all]) for _ in range(3)}) == 1
