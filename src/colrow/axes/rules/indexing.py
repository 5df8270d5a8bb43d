"""Operators that read or write where the values of a tensor say."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from colrow.axes.context import RuleContext, positive
from colrow.axes.factor import Factor
from colrow.axes.registry import rule
from colrow.trace.records import Value


@rule("aten.embedding", linear=["weight"])
def embedding(op: RuleContext) -> None:
    rows, features = op.dimensions("weight")
    op.look_up(rows)
    op.set_output([*op.dimensions("indices"), features])


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(op: RuleContext) -> None:
    """Rows ``[rows, features]`` looked up and put together bag by bag, ``[bags, features]``."""
    for value in op.inputs[1:]:
        op.block_dimensions(value, range(len(value.shape)), "bags that are read as a whole")
    rows, features = op.dimensions("weight")
    op.block(rows, "looked up in bags")
    for output, result in enumerate(op.outputs):
        dimensions = [op.blocked_atom(size, "bags") for size in result.shape]
        if len(dimensions) == 2:  # the bags, and for maxima which row each is from
            dimensions[1] = features
        op.set_output(dimensions, output)


@rule("aten.index_select", linear=["self"])
def index_select(op: RuleContext) -> None:
    dimensions = list(op.dimensions("self"))
    dimension = positive(op.argument("dim"), len(dimensions))
    indices = op.dimensions("index")
    if dimensions:
        op.look_up(dimensions[dimension])
        dimensions[dimension] = indices[0] if indices else op.atom(1)
    op.set_output(dimensions)


@rule("aten.gather", linear=["self"])
def gather(op: RuleContext) -> None:
    dimension = _indexed_dimension(op)
    _tie_others(op, op.value("index"), dimension, "gathered from a part of it")
    op.block_dimensions("self", [dimension], "gathered from")
    op.set_output(op.dimensions("index"))


@rule("aten.scatter.src", "aten.scatter_add", linear=[("self", "src")])
def scatter(op: RuleContext) -> None:
    _scatter(op)


@rule("aten.scatter.value", linear=[("self", "value")])
def scatter_value(op: RuleContext) -> None:
    _scatter(op)


@rule("aten.scatter", "aten.scatter_reduce")
def scatter_reduce(op: RuleContext) -> None:
    """Scattering that multiplies, or takes the largest."""
    _scatter(op)


def _scatter(op: RuleContext) -> None:
    dimension = _indexed_dimension(op)
    op.block_dimensions("self", [dimension], "scattered into")
    for name in ("index", "src"):
        value = op.optional(name)
        if value is not None and value.shape:
            op.block_dimensions(value, [dimension], "scattered into")
            _tie_others(op, value, dimension, "scattered into a part of it")
    op.set_output(op.dimensions("self"))


@rule("aten.index", "aten._unsafe_index", linear=["self"])
def index(op: RuleContext) -> None:
    op.set_output(_indexed(op, op.outputs[0].shape))


@rule("aten.index_put", "aten._index_put_impl", "aten._unsafe_index_put", linear=[("self", "values")])
def index_put(op: RuleContext) -> None:
    value, values = op.value("self"), op.value("values")
    indices = [index for index in op.argument("indices") if index is not None]
    if any(_is_mask(index) for index in indices):
        for written in (value, values, *indices):
            op.block_dimensions(written, range(len(written.shape)), "written where a mask says")
    else:
        result = _indexed(op, None)
        for factor in result:
            if not any(factor is kept for kept in op.dimensions(value)):
                op.block(factor, "written where it says")
        for factor, written in zip(reversed(result), reversed(op.dimensions(values)), strict=False):
            if written.size != 1:
                op.unify(factor, written)
    op.set_output(op.dimensions(value))


@rule("aten.index_add", "aten.index_copy", linear=[("self", "source")])
def index_add(op: RuleContext) -> None:
    _write_slices(op)


@rule("aten.index_reduce")
def index_reduce(op: RuleContext) -> None:
    _write_slices(op)


@rule("aten.index_fill", linear=[("self", "value")])
def index_fill(op: RuleContext) -> None:
    op.block_dimensions("self", [_indexed_dimension(op)], "written where indices say")
    op.block_dimensions("index", [0], "written where it says")
    op.set_output(op.dimensions("self"))


@rule("aten.select_scatter", linear=[("self", "src")])
def select_scatter(op: RuleContext) -> None:
    """``self`` with one index of a dimension replaced by ``src``."""
    dimensions = op.dimensions("self")
    dimension = positive(op.argument("dim"), len(dimensions))
    factor = dimensions[dimension]
    chosen = positive(op.argument("index"), factor.size)
    op.segment(factor, chosen, chosen + 1, "one element replaced")
    others = [factor for index, factor in enumerate(dimensions) if index != dimension]
    for factor, written in zip(others, op.dimensions("src"), strict=True):
        op.unify(factor, written)
    op.set_output(dimensions)


@rule("aten.slice_scatter", linear=[("self", "src")])
def slice_scatter(op: RuleContext) -> None:
    """``self`` with a slice of a dimension replaced by ``src``."""
    dimensions = op.dimensions("self")
    dimension = positive(op.argument("dim", 0), len(dimensions))
    size, text = dimensions[dimension].size, "a slice across its units"
    start, stop = int(op.argument("start", 0)), int(op.argument("end", size))
    start, stop = (bound + size if bound < 0 else bound for bound in (start, stop))
    for index, (factor, written) in enumerate(zip(dimensions, op.dimensions("src"), strict=True)):
        if index != dimension:
            op.unify(factor, written)
        elif int(op.argument("step", 1)) != 1:
            op.block(factor, "a strided slice")
            op.block(written, "a strided slice")
        else:
            op.unify(op.segment(factor, start, stop, text), written)
    op.set_output(dimensions)


@rule(
    "aten.masked_select",
    "aten.masked_scatter",
    "aten.nonzero",
    "aten.where.default",
    "aten.argwhere",
    "aten.take",
    "aten.put",
    "aten.bincount",
    "aten.histc",
    "aten._unique2",
    "aten.unique_dim",
    "aten.unique_consecutive",
    "aten.repeat_interleave",
)
def by_values(op: RuleContext) -> None:
    """Where an element goes depends on the values of all others."""
    op.block_all("positions that depend on the values")


@rule("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero", "aten._assert_async")
def read_by_program(op: RuleContext) -> None:
    """The program reads a number: every rank must see the same."""
    op.block_all("read by the program")


def _indexed_dimension(op: RuleContext) -> int:
    return positive(op.argument("dim"), len(op.value("self").shape))


def _tie_others(op: RuleContext, value: Value, dimension: int, text: str) -> None:
    """Tie the dimensions of ``value`` with those of ``self`` except the indexed one."""
    for index, (factor, other) in enumerate(zip(op.dimensions("self"), op.dimensions(value), strict=True)):
        if index == dimension:
            continue
        if factor.size == other.size:
            op.unify(factor, other)
        else:
            op.block(factor, text)
            op.block(other, text)


def _write_slices(op: RuleContext) -> None:
    """``self[index] = source`` (or ``+=``) along one dimension."""
    value, source = op.dimensions("self"), op.dimensions("source")
    dimension = _indexed_dimension(op)
    op.block_dimensions("self", [dimension], "written where indices say")
    op.block_dimensions("source", [dimension], "written where indices say")
    op.block_dimensions("index", [0], "written where it says")
    for index, (factor, written) in enumerate(zip(value, source, strict=False)):
        if index != dimension:
            op.unify(factor, written)
    op.set_output(value)


def _is_mask(index: Value) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _indexed(op: RuleContext, shape: Sequence[int] | None) -> list[Factor]:
    """The factors of ``self[indices]``, a result of ``shape``; masks need the shape.

    The indices are broadcast together; they stand where the first of them is if they are neighbours, and
    in front of everything else if they are not.
    """
    dimensions = op.dimensions("self")
    indices: list[Value] = []
    used: list[int] = []
    position = 0
    for given in op.argument("indices"):
        width = len(given.shape) if given is not None and _is_mask(given) else 1
        if given is not None:
            indices.append(given)
            used += range(position, position + width)
        position += width
    _block_indexed(op, indices, used)
    neighbours = used == list(range(used[0], used[0] + len(used)))
    at = used[0] if neighbours else 0
    if any(_is_mask(index) for index in indices):
        for index in indices:
            op.block_dimensions(index, range(len(index.shape)), "indices that are read as a whole")
        rest = len(dimensions) - len(used)
        assert shape is not None
        width = len(shape) - rest
        selected = [op.blocked_atom(size, "chosen by a mask") for size in shape[at : at + width]]
    else:
        selected = op.broadcast(indices, torch.broadcast_shapes(*[index.shape for index in indices]))
    kept = [factor for index, factor in enumerate(dimensions) if index not in used]
    return [*kept[:at], *selected, *kept[at:]]


def _block_indexed(op: RuleContext, indices: list[Value], used: list[int]) -> None:
    """Block the dimensions indexed, but of a single index that is known only what is counted over."""
    if len(indices) == 1 and not _is_mask(indices[0]):
        content = indices[0].content
        if content is not None and content.numel() == 1:
            _block_one(op, op.dimensions("self")[used[0]], int(content.item()))
            return
    op.block_dimensions("self", used, "indexed by the values of a tensor")


def _block_one(op: RuleContext, factor: Factor, chosen: int) -> None:
    """Cut around one index. It is a tensor's content, which stays as it is: what precedes it must too."""
    text = "one element selected"
    at = positive(chosen, factor.size)
    op.segment(factor, at, at + 1, text)
    counted = (
        op.segment(factor, 0, at, text) if chosen >= 0 else op.segment(factor, at + 1, factor.size, text)
    )
    op.block(counted, "counted over to find an element")
