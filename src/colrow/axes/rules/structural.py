"""Operators that only rearrange: every element of the result is an element of an input."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from colrow.axes.context import Dimensions, RuleContext, positive
from colrow.axes.factor import Factor
from colrow.axes.registry import rule
from colrow.trace.records import Value


def regroup(op: RuleContext, dimensions: Sequence[Factor], sizes: Sequence[int]) -> list[Factor]:
    """The factors of a row-major reshape to ``sizes``: blocks as small as possible, each split anew."""
    sizes = [int(size) for size in sizes]
    if 0 in sizes:
        return op.atoms(sizes)
    left = [factor for factor in dimensions if factor.size != 1]
    right = [size for size in sizes if size != 1]
    found: list[Factor] = []
    i = j = 0
    while i < len(left):
        group, wanted = [left[i]], [right[j]]
        old, new = left[i].size, right[j]
        i, j = i + 1, j + 1
        while old != new:
            if old < new:
                group.append(left[i])
                old, i = old * left[i].size, i + 1
            else:
                wanted.append(right[j])
                new, j = new * right[j], j + 1
        whole = op.factors.product(group)
        parts = op.split(whole, wanted, "a view that mixes its factors")
        found += parts or [op.blocked_atom(size, "a view that mixes its factors") for size in wanted]
    rest = iter(found)
    return [op.atom(1) if size == 1 else next(rest) for size in sizes]


@rule(
    "aten.view",
    "aten._unsafe_view",
    "aten.reshape",
    "aten._reshape_alias",
    "aten.view_copy",
    linear=["self"],
)
def view(op: RuleContext) -> None:
    """Also ``view(dtype)``, which keeps all dimensions if both types are of one width."""
    value, target = op.value("self"), op.outputs[0]
    if isinstance(op.argument("dtype"), torch.dtype):
        if value.dtype.itemsize == target.dtype.itemsize:
            op.set_output(op.dimensions(value))
        else:
            op.block_all("a view as numbers of another width")
        return
    op.set_output(regroup(op, op.dimensions(value), target.shape))


@rule("aten.t", linear=["self"])
def t(op: RuleContext) -> None:
    op.set_output(op.dimensions("self")[::-1])


@rule("aten.transpose", linear=["self"])
def transpose(op: RuleContext) -> None:
    dimensions = list(op.dimensions("self"))
    first, second = (positive(op.argument(name), len(dimensions)) for name in ("dim0", "dim1"))
    if dimensions:
        dimensions[first], dimensions[second] = dimensions[second], dimensions[first]
    op.set_output(dimensions)


@rule("aten.permute", linear=["self"])
def permute(op: RuleContext) -> None:
    dimensions = op.dimensions("self")
    op.set_output([dimensions[dimension] for dimension in op.argument("dims")])


@rule("aten.unsqueeze", linear=["self"])
def unsqueeze(op: RuleContext) -> None:
    dimensions = list(op.dimensions("self"))
    dimensions.insert(positive(op.argument("dim"), len(dimensions) + 1), op.atom(1))
    op.set_output(dimensions)


@rule("aten.squeeze", linear=["self"])
def squeeze(op: RuleContext) -> None:
    """A dimension that could vanish must not be cut: a rank's part of it may have one index."""
    dimensions = op.dimensions("self")
    given = op.argument("dim")
    if given is None:
        chosen = set(range(len(dimensions)))
    else:
        listed = given if isinstance(given, (list, tuple)) else [given]
        chosen = {positive(dimension, len(dimensions)) for dimension in listed}
    op.block_dimensions(
        "self", sorted(chosen & set(range(len(dimensions)))), "squeezed where it has one index"
    )
    op.set_output(
        [factor for index, factor in enumerate(dimensions) if index not in chosen or factor.size != 1]
    )


@rule("aten.expand", "aten.expand_copy", linear=["self"])
def expand(op: RuleContext) -> None:
    op.set_output(op.broadcast([op.value("self")], op.outputs[0].shape))


@rule("aten.repeat", linear=["self"])
def repeat(op: RuleContext) -> None:
    repeats = [int(count) for count in op.argument("repeats")]
    if 0 in op.outputs[0].shape:
        op.set_output(op.atoms(op.outputs[0].shape))
        return
    dimensions = op.dimensions("self")
    padded = [op.atom(1)] * (len(repeats) - len(dimensions)) + list(dimensions)
    op.set_output(
        [
            factor if count == 1 else op.factors.product([op.atom(count), factor])
            for count, factor in zip(repeats, padded, strict=True)
        ]
    )


@rule("aten.slice", linear=["self"])
def slice_(op: RuleContext) -> None:
    value = op.value("self")
    dimensions = list(op.dimensions(value))
    dimension = positive(op.argument("dim", 0), len(dimensions))
    size, step = value.shape[dimension], int(op.argument("step", 1))
    start, stop = int(op.argument("start", 0)), int(op.argument("end", size))
    start, stop = (bound + size if bound < 0 else bound for bound in (start, stop))
    if step == 1:
        dimensions[dimension] = op.segment(dimensions[dimension], start, stop, "a slice across its units")
    else:
        dimensions[dimension] = _strided(op, dimensions[dimension], start, stop, step)
    op.set_output(dimensions)


def _strided(op: RuleContext, factor: Factor, start: int, stop: int, step: int) -> Factor:
    """``x[start::step]`` over the whole of a multiple of ``step`` keeps the outer of two factors."""
    if factor.size % step == 0 and start < step and stop >= factor.size:
        parts = op.split(factor, [factor.size // step, step], "a strided slice")
        if parts is not None and op.cut(parts[1], range(step), "a strided slice") is not None:
            return parts[0]
    op.block(factor, "a strided slice")
    size = op.outputs[0].shape[positive(op.argument("dim", 0), len(op.outputs[0].shape))]
    return op.blocked_atom(size, "a strided slice")


@rule("aten.select", linear=["self"])
def select(op: RuleContext) -> None:
    """Cut around the selected index, which is a part of its own from then on."""
    value = op.value("self")
    dimensions = op.dimensions(value)
    dimension = positive(op.argument("dim"), len(dimensions))
    factor = dimensions[dimension]
    if _selected_by_tensor(op):
        op.block(factor, "an element chosen by the values of a tensor")
    else:
        index = positive(op.argument("index"), factor.size)
        op.segment(factor, index, index + 1, "one element selected")
    op.set_output(_without(dimensions, dimension))


def _selected_by_tensor(op: RuleContext) -> bool:
    """Whether the model wrote ``x[i]`` with a tensor ``i``, whose traced value says nothing."""
    call = op.operation.call
    if call is None or call.name != "__getitem__" or len(call.arguments) < 2:
        return False
    indices = call.arguments[1]
    return any(
        isinstance(index, Value) and not index.shape
        for index in (indices if isinstance(indices, (list, tuple)) else [indices])
    )


@rule("aten.unbind", "aten.unbind_copy", linear=["self"])
def unbind(op: RuleContext) -> None:
    dimensions = op.dimensions("self")
    dimension = positive(op.argument("dim", 0), len(dimensions))
    op.cut(dimensions[dimension], range(dimensions[dimension].size), "unbound element by element")
    for output in range(len(op.outputs)):
        op.set_output(_without(dimensions, dimension), output)


@rule(
    "aten.split",
    "aten.split_copy",
    "aten.unsafe_split",
    "aten.split_with_sizes",
    "aten.split_with_sizes_copy",
    "aten.unsafe_split_with_sizes",
    linear=["self"],
)
def split(op: RuleContext) -> None:
    dimensions = list(op.dimensions("self"))
    dimension = positive(op.argument("dim", 0), len(dimensions))
    whole, start = dimensions[dimension], 0
    for output, value in enumerate(op.outputs):
        stop = start + value.shape[dimension]
        dimensions[dimension] = op.segment(whole, start, stop, "a split across its units")
        op.set_output(dimensions, output)
        start = stop


@rule("aten.cat", linear=["tensors"])
def cat(op: RuleContext) -> None:
    shape = op.outputs[0].shape
    values = [value for value in op.inputs if len(value.shape) == len(shape)]
    dimension = positive(op.argument("dim", 0), len(shape))
    dimensions = list(op.dimensions(values[0]))
    for value in values[1:]:
        for index, factor in enumerate(op.dimensions(value)):
            if index != dimension:
                op.unify(dimensions[index], factor)
    dimensions[dimension] = op.factors.concatenation([op.dimensions(value)[dimension] for value in values])
    op.set_output(dimensions)


@rule("aten.stack", linear=["tensors"])
def stack(op: RuleContext) -> None:
    values = op.inputs
    dimensions = op.broadcast(values, values[0].shape)
    pieces = op.factors.concatenation([op.atom(1) for _ in values])
    dimensions.insert(positive(op.argument("dim", 0), len(dimensions) + 1), pieces)
    op.set_output(dimensions)


@rule("aten.constant_pad_nd", linear=[("self", "value")])
def constant_pad_nd(op: RuleContext) -> None:
    """Padding is a part of its own; negative padding cuts a part off."""
    padding = [int(width) for width in op.argument("pad")]
    dimensions = list(op.dimensions("self"))
    for pair in range(len(padding) // 2):
        index = len(dimensions) - 1 - pair
        before, after = padding[2 * pair : 2 * pair + 2]
        if before == after == 0:
            continue
        factor = dimensions[index]
        kept = op.segment(factor, max(0, -before), factor.size - max(0, -after), "padded across its units")
        dimensions[index] = op.factors.concatenation([op.atom(max(0, before)), kept, op.atom(max(0, after))])
    op.set_output(dimensions)


@rule("aten.unfold", linear=["self"])
def unfold(op: RuleContext) -> None:
    """Windows that do not overlap are a product; others mix."""
    dimensions = list(op.dimensions("self"))
    dimension = positive(op.argument("dimension"), len(dimensions))
    factor, size, step = dimensions[dimension], int(op.argument("size")), int(op.argument("step"))
    parts = None
    if size == step and factor.size % size == 0:
        parts = op.split(factor, [factor.size // size, size], "windows across its units")
    if parts is None:
        op.block(factor, "windows over it")
        count = op.outputs[0].shape[dimension]
        parts = [op.blocked_atom(count, "windows over it"), op.blocked_atom(size, "windows over it")]
    dimensions[dimension] = parts[0]
    op.set_output([*dimensions, parts[1]])


@rule("aten.diagonal", linear=["self"])
def diagonal(op: RuleContext) -> None:
    dimensions = op.dimensions("self")
    both = {positive(op.argument(name, default), len(dimensions)) for name, default in _DIAGONAL}
    op.block_dimensions("self", both, "its diagonal taken")
    kept = [factor for index, factor in enumerate(dimensions) if index not in both]
    op.set_output([*kept, op.blocked_atom(op.outputs[0].shape[-1], "a diagonal")])


_DIAGONAL = (("dim1", 0), ("dim2", 1))


@rule("aten.diag_embed", linear=["self"])
def diag_embed(op: RuleContext) -> None:
    """The last dimension becomes the diagonal of two."""
    *batch, last = op.dimensions("self")
    op.block(last, "put on a diagonal")
    shape = op.outputs[0].shape
    both = sorted(positive(op.argument(name, default), len(shape)) for name, default in _EMBEDDED)
    for dimension in both:
        batch.insert(dimension, op.blocked_atom(shape[dimension], "a diagonal"))
    op.set_output(batch)


_EMBEDDED = (("dim1", -2), ("dim2", -1))


@rule("aten.as_strided", "aten.as_strided_copy", linear=["self"])
def as_strided(op: RuleContext) -> None:
    op.block_all("addressed by strides")


@rule(
    "aten.clone",
    "aten.detach",
    "aten.alias",
    "aten.contiguous",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten.lift",
    "aten._to_copy",
    "aten._conj",
    "aten.view_as_real",
    "aten.view_as_complex",
    linear=["self"],
)
def same(op: RuleContext) -> None:
    """The same elements in the same places; complex numbers as pairs have one dimension more or less."""
    dimensions = list(op.dimensions("self"))
    if len(op.outputs[0].shape) < len(dimensions):
        op.block(dimensions.pop(), "the real and the imaginary part")
    elif len(op.outputs[0].shape) > len(dimensions):
        dimensions.append(op.blocked_atom(2, "the real and the imaginary part"))
    op.set_output(dimensions)


@rule("aten.copy", linear=["src"])
def copy(op: RuleContext) -> None:
    """``self.copy_(src)``: the result has the factors of ``self``, to which ``src`` is broadcast."""
    target = op.value("self")
    op.set_output(op.dimensions(target))
    op.broadcast([target, op.value("src")], target.shape)


def _without(dimensions: Dimensions, dimension: int) -> list[Factor]:
    return [factor for index, factor in enumerate(dimensions) if index != dimension]
