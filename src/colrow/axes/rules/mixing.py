"""Operators in which every element along a dimension depends on all others: it cannot be cut."""

from __future__ import annotations

from collections.abc import Iterable

from colrow.axes.context import RuleContext, positive
from colrow.axes.factor import Factor
from colrow.axes.registry import rule
from colrow.trace.records import Value


@rule(
    "aten._softmax",
    "aten._safe_softmax",
    "aten.softmax",
    "aten.cumprod",
    "aten.logcumsumexp",
    "aten.cummax",
    "aten.cummin",
    "aten.argsort",
)
def along_one(op: RuleContext) -> None:
    dimension = op.argument("dim", -1)
    op.block_dimensions("self", [dimension], f"{op.name.removeprefix('aten.').lstrip('_')} over it")
    op.set_same("self")


@rule("aten.cumsum", linear=["self"])
def cumsum(op: RuleContext) -> None:
    op.block_dimensions("self", [op.argument("dim")], "cumsum over it")
    op.set_same("self")


@rule("aten.sort")
def sort(op: RuleContext) -> None:
    op.block_dimensions("self", [op.argument("dim", -1)], "sorted")
    op.set_same("self")


@rule("aten.flip", linear=["self"])
def flip(op: RuleContext) -> None:
    op.block_dimensions("self", op.argument("dims"), "flipped")
    op.set_same("self")


@rule("aten.roll", linear=["self"])
def roll(op: RuleContext) -> None:
    value = op.value("self")
    op.block_dimensions(value, op.argument("dims") or range(len(value.shape)), "rolled")
    op.set_same(value)


@rule("aten.tril", "aten.triu", linear=["self"])
def triangle(op: RuleContext) -> None:
    op.block_dimensions("self", [-2, -1], "a triangle of it taken")
    op.set_same("self")


@rule("aten.topk", "aten.kthvalue", "aten.mode", "aten.median", "aten.nanmedian")
def topk(op: RuleContext) -> None:
    value = op.value("self")
    given = op.argument("dim", -1)
    dimension = positive(given, len(value.shape))
    text = f"{op.name.removeprefix('aten.').lstrip('_')} over it"
    op.block_dimensions(value, [dimension], text)
    for output, result in enumerate(op.outputs):
        dimensions: list[Factor] = list(op.dimensions(value))
        if len(result.shape) < len(value.shape):
            dimensions.pop(dimension)
        elif dimensions:
            dimensions[dimension] = op.blocked_atom(result.shape[dimension], text)
        op.set_output(dimensions, output)


@rule("aten.multinomial", random=True)
def multinomial(op: RuleContext) -> None:
    op.block_dimensions("self", [-1], "drawn from")
    count = op.blocked_atom(op.outputs[0].shape[-1], "drawn together")
    op.set_output([*op.dimensions("self")[:-1], count])


@rule("aten.mean", linear=["self"])
def mean(op: RuleContext) -> None:
    reduce(op, op.value("self"), "mean over it")


@rule(
    "aten.amax",
    "aten.amin",
    "aten.aminmax",
    "aten.median",
    "aten.nanmedian",
    "aten.max",
    "aten.min",
    "aten.argmax",
    "aten.argmin",
    "aten.any",
    "aten.all",
    "aten._is_all_true",
    "aten._is_any_true",
    "aten.var",
    "aten.var_mean",
    "aten.std",
    "aten.std_mean",
    "aten.prod",
    "aten.logsumexp",
    "aten.norm",
    "aten.linalg_vector_norm",
    "aten.count_nonzero",
)
def reduced(op: RuleContext) -> None:
    reduce(op, op.value("self"), f"{op.name.removeprefix('aten.').lstrip('_')} over it")


def reduce(op: RuleContext, value: Value, text: str) -> None:
    """Results without (or with ones for) the dimensions named ``dim``, which are blocked."""
    dimensions = op.dimensions(value)
    given = op.argument("dim")
    listed: Iterable[int] = [given] if isinstance(given, int) else list(given or range(len(dimensions)))
    removed = {positive(dimension, len(dimensions)) for dimension in listed} if dimensions else set()
    op.block_dimensions(value, sorted(removed), text)
    for output, result in enumerate(op.outputs):
        keep = len(result.shape) == len(dimensions)
        op.set_output(
            [
                op.atom(1) if index in removed else factor
                for index, factor in enumerate(dimensions)
                if keep or index not in removed
            ],
            output,
        )


@rule("aten._fft_r2c", "aten._fft_c2r", "aten._fft_c2c", linear=["self"])
def fourier(op: RuleContext) -> None:
    value = op.value("self")
    chosen = {positive(dimension, len(value.shape)) for dimension in op.argument("dim")}
    op.block_dimensions(value, sorted(chosen), "a Fourier transform over it")
    op.set_output(
        [
            op.blocked_atom(size, "a Fourier transform over it") if index in chosen else factor
            for index, (factor, size) in enumerate(
                zip(op.dimensions(value), op.outputs[0].shape, strict=True)
            )
        ]
    )


@rule("aten.glu")
def glu(op: RuleContext) -> None:
    """The first half times the sigmoid of the second: the halves are alike."""
    dimensions = list(op.dimensions("self"))
    dimension = positive(op.argument("dim", -1), len(dimensions))
    half, text = dimensions[dimension].size // 2, "halves across its units"
    first = op.segment(dimensions[dimension], 0, half, text)
    op.unify(first, op.segment(dimensions[dimension], half, 2 * half, text))
    dimensions[dimension] = first
    op.set_output(dimensions)


@rule("aten.linalg_cross", linear=["self", "other"])
def cross(op: RuleContext) -> None:
    dimensions = op.broadcast(op.inputs, op.outputs[0].shape)
    op.block(dimensions[op.argument("dim", -1)], "a vector product over it")
    op.set_output(dimensions)


@rule("aten._cdist_forward", "aten._euclidean_dist")
def distances(op: RuleContext) -> None:
    """``[..., rows, features]`` and ``[..., others, features]`` to ``[..., rows, others]``."""
    first, second = op.dimensions("x1"), op.dimensions("x2")
    if [factor.size for factor in first[:-2]] != [factor.size for factor in second[:-2]]:
        op.block_all("distances between batches of different shapes")
        return
    for a, b in zip(first[:-2], second[:-2], strict=True):
        op.unify(a, b)
    for factor in (first[-1], second[-1]):
        op.block(factor, "distances over it")
    op.set_output([*first[:-1], second[-2]])


@rule("aten.channel_shuffle", "aten.native_channel_shuffle", linear=["self"])
def channel_shuffle(op: RuleContext) -> None:
    op.block_dimensions("self", [1], "shuffled")
    op.set_same("self")
