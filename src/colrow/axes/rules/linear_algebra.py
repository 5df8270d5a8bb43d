"""Decompositions, inverses, systems of equations: matrices are taken as a whole, batches of them are kept."""

from __future__ import annotations

from colrow.axes.context import RuleContext
from colrow.axes.registry import rule
from colrow.trace.records import Value

TEXT = "a matrix that is taken as a whole"


@rule(
    "aten.linalg_inv_ex",
    "aten.linalg_cholesky_ex",
    "aten.linalg_qr",
    "aten._linalg_svd",
    "aten._linalg_eigh",
    "aten._linalg_det",
    "aten._linalg_slogdet",
    "aten.linalg_lu_factor_ex",
    "aten.linalg_matrix_exp",
    "aten.linalg_pinv",
)
def of_matrices(op: RuleContext) -> None:
    """Results that belong to single matrices ``[..., rows, columns]``."""
    batch = op.dimensions(op.inputs[0])[:-2]
    op.block_dimensions(op.inputs[0], [-2, -1], TEXT)
    for output, result in enumerate(op.outputs):
        rest = result.shape[len(batch) :]
        if result.shape[: len(batch)] == op.inputs[0].shape[: len(batch)]:
            op.set_output([*batch, *(op.blocked_atom(size, TEXT) for size in rest)], output)
        else:  # not computed, so empty
            op.set_output([op.blocked_atom(size, TEXT) for size in result.shape], output)


@rule("aten.linalg_solve_triangular", linear=["B"])
def solve_triangular(op: RuleContext) -> None:
    _solve(op, op.value("self"), op.value("B"))


@rule("aten._linalg_solve_ex", linear=["B"])
def solve(op: RuleContext) -> None:
    _solve(op, op.value("A"), op.value("B"))


def _solve(op: RuleContext, matrices: Value, sides: Value) -> None:
    """``X`` in ``A X = B``, or in ``X A = B``: each column of ``B``, or each row, is a system of its own."""
    if matrices.shape[:-2] != sides.shape[:-2] or len(sides.shape) < 2:
        op.block_all(TEXT)
        return
    left = bool(op.argument("left", True))
    op.block_dimensions(matrices, [-2, -1], TEXT)
    op.block_dimensions(sides, [-2 if left else -1], TEXT)
    batch, given = op.dimensions(matrices)[:-2], op.dimensions(sides)
    for first, second in zip(batch, given[:-2], strict=True):
        op.unify(first, second)
    op.set_output(given)
    for output, result in enumerate(op.outputs[1:], start=1):
        rest = result.shape[len(batch) :]
        op.set_output([*batch, *(op.blocked_atom(size, TEXT) for size in rest)], output)
