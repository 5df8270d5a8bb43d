"""Operators that sum over a dimension: cut along it, they give partial sums."""

from __future__ import annotations

from colrow.axes.context import RuleContext, positive
from colrow.axes.registry import rule
from colrow.trace.records import Value


def _matrix_product(op: RuleContext, left: Value, right: Value) -> None:
    """``[..., rows, inner] x [..., inner, columns]``, batch dimensions alike."""
    first, second = op.dimensions(left), op.dimensions(right)
    for a, b in zip(first[:-2], second[:-2], strict=True):
        op.unify(a, b)
    op.unify(first[-1], second[-2])
    op.contract(first[-1])
    op.set_output([*first[:-1], second[-1]])


def _addend(op: RuleContext, value: Value) -> None:
    """Tie what is added to a product with the result."""
    op.broadcast([op.outputs[0], value], op.outputs[0].shape)


@rule("aten.mm", linear=["self", "mat2"])
def mm(op: RuleContext) -> None:
    _matrix_product(op, op.value("self"), op.value("mat2"))


@rule("aten.bmm", linear=["self", "mat2"])
def bmm(op: RuleContext) -> None:
    _matrix_product(op, op.value("self"), op.value("mat2"))


@rule("aten.addmm", linear=[("self", "mat1"), ("self", "mat2")], addends=["self"])
def addmm(op: RuleContext) -> None:
    _matrix_product(op, op.value("mat1"), op.value("mat2"))
    _addend(op, op.value("self"))


@rule("aten.baddbmm", linear=[("self", "batch1"), ("self", "batch2")], addends=["self"])
def baddbmm(op: RuleContext) -> None:
    _matrix_product(op, op.value("batch1"), op.value("batch2"))
    _addend(op, op.value("self"))


@rule("aten.addbmm", linear=[("self", "batch1"), ("self", "batch2")], addends=["self"])
def addbmm(op: RuleContext) -> None:
    """``self + sum over the batch of batch1 x batch2``."""
    first, second = op.dimensions("batch1"), op.dimensions("batch2")
    op.unify(first[0], second[0])
    op.unify(first[2], second[1])
    op.contract(first[0])
    op.contract(first[2])
    op.set_output([first[1], second[2]])
    _addend(op, op.value("self"))


@rule("aten.mv", linear=["self", "vec"])
def mv(op: RuleContext) -> None:
    _matrix_vector(op, op.value("self"), op.value("vec"))


@rule("aten.addmv", linear=[("self", "mat"), ("self", "vec")], addends=["self"])
def addmv(op: RuleContext) -> None:
    _matrix_vector(op, op.value("mat"), op.value("vec"))
    _addend(op, op.value("self"))


def _matrix_vector(op: RuleContext, matrix: Value, vector: Value) -> None:
    rows, inner = op.dimensions(matrix)
    op.unify(inner, op.dimensions(vector)[0])
    op.contract(inner)
    op.set_output([rows])


@rule("aten.dot", "aten.vdot", linear=["self", "tensor", "other"])
def dot(op: RuleContext) -> None:
    """The second argument is called ``tensor`` in one and ``other`` in the other."""
    first, second = op.inputs
    inner = op.dimensions(first)[0]
    op.unify(inner, op.dimensions(second)[0])
    op.contract(inner)
    op.set_output([])


@rule("aten.addr", linear=[("self", "vec1"), ("self", "vec2")])
def addr(op: RuleContext) -> None:
    """``self + vec1 x vec2``, the outer product: nothing is summed."""
    op.set_output([op.dimensions("vec1")[0], op.dimensions("vec2")[0]])
    _addend(op, op.value("self"))


@rule("aten.linear", linear=[("input", "bias"), ("weight", "bias")], addends=["bias"])
def linear(op: RuleContext) -> None:
    """Only where a backend does not take it apart."""
    value, weight = op.dimensions("input"), op.dimensions("weight")
    op.unify(value[-1], weight[-1])
    op.contract(value[-1])
    op.set_output([*value[:-1], *weight[:-1]])
    bias = op.optional("bias")
    if bias is not None:
        _addend(op, bias)


@rule("aten._trilinear", linear=["i1", "i2", "i3"])
def trilinear(op: RuleContext) -> None:
    """Three tensors, given dimensions of one index each, are multiplied and summed over some dimensions."""
    expanded = []
    for name in ("1", "2", "3"):
        dimensions = list(op.dimensions(f"i{name}"))
        for dimension in sorted(op.argument(f"expand{name}")):
            dimensions.insert(int(dimension), op.atom(1))
        expanded.append(dimensions)
    result = []
    for factors in zip(*expanded, strict=True):
        first, *others = [factor for factor in factors if factor.size != 1] or factors
        for factor in others:
            op.unify(first, factor)
        result.append(first)
    summed = {int(dimension) for dimension in op.argument("sumdim")}
    for dimension in summed:
        op.contract(result[dimension])
    op.set_output([factor for index, factor in enumerate(result) if index not in summed])


@rule("aten.sum", "aten.nansum", linear=["self"])
def sum_(op: RuleContext) -> None:
    dimensions = op.dimensions("self")
    given = op.argument("dim")
    listed = [given] if isinstance(given, int) else list(given or range(len(dimensions)))
    summed = {positive(dimension, len(dimensions)) for dimension in listed}
    for dimension in sorted(summed & set(range(len(dimensions)))):
        op.contract(dimensions[dimension])
    keep = bool(op.argument("keepdim", False))
    op.set_output(
        [
            op.atom(1) if index in summed else factor
            for index, factor in enumerate(dimensions)
            if keep or index not in summed
        ]
    )


@rule("aten._grouped_mm", linear=["self", "mat2"])
def grouped_mm(op: RuleContext) -> None:
    """Rows sorted by expert ``[rows, inner]`` times the experts' matrices ``[experts, inner, columns]``.

    The experts are looked up: with some of them, a rank's rows of the others are zero. Where the rows of each
    expert end (``offs``) is then read as a whole.
    """
    first, second = op.value("self"), op.value("mat2")
    rows, weights = op.dimensions(first), op.dimensions(second)
    if len(rows) != 2 or len(weights) != 3 or op.optional("offs") is None or op.optional("bias"):
        op.block_all("groups of this form")
        return
    op.unify(rows[1], weights[1])
    op.contract(rows[1])
    op.look_up(weights[0])
    op.block(rows[0], "rows sorted by group")
    op.block_dimensions("offs", [0], "ends of groups, read as a whole")
    for other in op.value("offs").uses:
        if other.name == op.name and other.index < op.operation.index:
            op.unify(weights[0], op.dimensions(other.inputs[1])[0])  # the same rows by the same experts
    op.set_output([rows[0], weights[2]])
