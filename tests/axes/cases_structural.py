"""Cases for operators that only rearrange."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from colrow.axes import Axes, Factor
from colrow.trace.records import Operation
from tests.axes.brute_force import Case, Extent, Length, Offset, Part
from tests.axes.drawing import Draw, case


@case(
    "aten.view",
    "aten._unsafe_view",
    "aten.reshape",
    "aten.view_copy",
)
def reshape(draw: Draw, function: Any) -> Case:
    """Factors regrouped into two shapes, with ones anywhere."""
    factors = draw.sizes(2, 5)

    def grouping() -> list[int]:
        shape, rest = list[int](), list(factors)
        while rest:
            count = draw.size(0, len(rest))
            shape.append(prod(rest[:count]))
            del rest[:count]
        return shape

    before, after = grouping(), grouping()
    sizes = [Extent(size, ~0, index) for index, size in enumerate(after)]
    return Case(function, [draw.tensor(*before), sizes], free=1)


@case("aten._reshape_alias")
def reshape_alias(draw: Draw, function: Any) -> Case:
    rows, a, b = draw.size(), draw.size(), draw.size()
    sizes = [Extent(rows, ~0, 0), Extent(a, ~0, 1), Extent(b, ~0, 2)]
    strides = [Length(a * b, Offset(0, 0, 1)), Extent(b, ~0, 2), 1]
    return Case(function, [draw.tensor(rows, a * b), sizes, strides], free=3)


@case("aten.view.dtype")
def view_dtype(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.tensor(*draw.sizes()), torch.int64], free=1)


@case("aten.t")
def t(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.tensor(*draw.sizes(2, 2))], free=2)


@case("aten.transpose.int")
def transpose(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    arguments = [draw.tensor(*shape), draw.dimension(len(shape)), draw.dimension(len(shape))]
    return Case(function, arguments, free=len(shape))


@case("aten.permute")
def permute(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    return Case(function, [draw.tensor(*shape), draw.permutation(len(shape))], free=len(shape))


@case("aten.unsqueeze")
def unsqueeze(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    return Case(function, [draw.tensor(*shape), draw.dimension(len(shape) + 1)], free=len(shape))


@case("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(draw: Draw, function: Any) -> Case:
    shape = [2, *draw.sizes(), 1, 3, 1]
    dimension = draw.dimension(len(shape))
    given = {"default": [], "dim": [dimension], "dims": [[dimension % len(shape)]]}
    return Case(function, [draw.tensor(*shape), *given[function._overloadname]])


@case("aten.expand", "aten.expand_copy")
def expand(draw: Draw, function: Any) -> Case:
    a, b, c, d = (draw.size() for _ in range(4))
    target = [Extent(a, ~0, 0), Extent(b, ~0, 1), Extent(c, ~0, 2), draw.choice(-1, Extent(d, ~0, 3))]
    return Case(function, [draw.tensor(b, 1, d), target], free=4)


@case("aten.repeat")
def repeat(draw: Draw, function: Any) -> Case:
    a, b = draw.size(), draw.size()
    count = Part(draw.size(), lambda axes, operation: parts(axes, operation, 1, "product")[0])
    return Case(function, [draw.tensor(a, b, 1), [Extent(2, ~0, 0), count, 1, Extent(3, ~0, 3)]], free=5)


def parts(axes: Axes, operation: Operation, dimension: int, kind: Any) -> list[Factor]:
    """What a dimension of the result is made of."""
    return axes.factors.parts(axes.dimensions(operation.outputs[0])[dimension], kind)


@case("aten.slice.Tensor")
def slice_(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    shape[0] = draw.size(3, 6)
    start = draw.size(0, shape[0] - 2)
    stop = draw.size(start + 1, shape[0])
    first, second = Offset(start, 0, 0), Offset(stop, 0, 0)
    arguments = [draw.tensor(*shape), 0, first, second if stop < shape[0] else 2**63 - 1]
    return Case(function, arguments, free=len(shape) - 1)


@case("aten.slice.Tensor")
def slice_strided(draw: Draw, function: Any) -> Case:
    step, outer = draw.size(2, 3), draw.size()
    start = draw.size(0, step - 1)
    arguments = [draw.tensor(draw.size(), step * outer), 1, start, 2**63 - 1, step]
    return Case(function, arguments, free=2)


@case("aten.slice.Tensor")
def slice_negative(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.tensor(3, 6), 1, Offset(-4, 0, 1), Offset(-1, 0, 1)], free=3)


@case("aten.select.int")
def select(draw: Draw, function: Any) -> Case:
    shape = [draw.size(4, 6), *draw.sizes()]
    index = draw.choice(0, shape[0] - 1, shape[0] // 2)
    return Case(function, [draw.tensor(*shape), 0, Offset(index, 0, 0)], free=len(shape))


@case("aten.unbind.int", "aten.unbind_copy.int")
def unbind(draw: Draw, function: Any) -> Case:
    shape = draw.sizes(2, 4)
    return Case(function, [draw.tensor(*shape), draw.dimension(len(shape))], free=len(shape) - 1)


@case("aten.split.Tensor", "aten.split_copy.Tensor", "aten.unsafe_split.Tensor")
def split(draw: Draw, function: Any) -> Case:
    size, count = draw.size(), draw.size(2, 3)
    value = draw.tensor(draw.size(), size * count)
    lengths = [Length(size, Offset(index * size, 0, 1)) for index in range(count)]
    local = (torch.ops.aten.split_with_sizes.default, [value, lengths, -1])
    return Case(function, [value, size, -1], free=1 + count, local=local)


@case("aten.split_with_sizes", "aten.split_with_sizes_copy", "aten.unsafe_split_with_sizes")
def split_with_sizes(draw: Draw, function: Any) -> Case:
    sizes, start = draw.sizes(2, 3), 0
    lengths = list[Length]()
    for size in sizes:
        lengths.append(Length(size, Offset(start, 0, 1)))
        start += size
    return Case(function, [draw.tensor(draw.size(), start, 3), lengths, 1], free=2 + len(sizes))


@case("aten.cat")
def cat(draw: Draw, function: Any) -> Case:
    rows, columns = draw.size(), draw.size()
    tensors = [draw.tensor(rows, draw.size(), columns) for _ in range(draw.size(1, 3))]
    return Case(function, [tensors, draw.choice(1, -2)], free=2 + len(tensors))


@case("aten.stack")
def stack(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    tensors = [draw.tensor(*shape) for _ in range(draw.size(1, 3))]
    return Case(function, [tensors, draw.dimension(len(shape) + 1)], free=len(shape))


@case("aten.constant_pad_nd")
def constant_pad_nd(draw: Draw, function: Any) -> Case:
    rows, columns = draw.size(), draw.size(5, 6)
    value = draw.tensor(rows, columns, 3)
    before = Part(2, lambda axes, operation: parts(axes, operation, 1, "sum")[0])
    padding = draw.choice([0, 0, before, 1], [0, 0, -1, 0], [0, 0, 1, -1], [0, 0, 0, 1, 1, 0])
    return Case(function, [value, padding, draw.choice(0.0, 1.5)], free=3)


@case("aten.unfold")
def unfold(draw: Draw, function: Any) -> Case:
    size, count = draw.size(), draw.size()
    window = Length(size, Offset(0, 0, 1))
    plain = Case(
        function, [draw.tensor(2, size * count), 1, Extent(size, ~0, 2), Extent(size, ~0, 2)], free=3
    )
    mixing = Case(function, [draw.tensor(3, 6), 1, window, 1], free=1)
    return draw.choice(plain, mixing)


@case("aten.diagonal")
def diagonal(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.tensor(3, draw.size(), 3), 0, 0, 2], free=1)


@case("aten.diag_embed")
def diag_embed(draw: Draw, function: Any) -> Case:
    shape = draw.sizes(1, 3)
    given = draw.choice([], [1], [0, 0, -1])
    return Case(function, [draw.tensor(*shape), *given], free=len(shape) - 1)


@case("aten.as_strided", "aten.as_strided_copy")
def as_strided(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.tensor(3, 4), [4, 3], [1, 4]])


@case(
    "aten.clone",
    "aten.detach",
    "aten.alias",
    "aten.contiguous",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten.lift",
    "aten._to_copy",
)
def same(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    return Case(function, [draw.tensor(*shape)], free=len(shape))


@case("aten.view_as_real", "aten._conj")
def view_as_real(draw: Draw, function: Any) -> Case:
    return Case(function, [torch.complex(draw.tensor(3, 2), draw.tensor(3, 2))], free=2)


@case("aten.view_as_complex")
def view_as_complex(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.tensor(3, draw.size(), 2)], free=2)


@case("aten.copy", "aten.copy_")
def copy(draw: Draw, function: Any) -> Case:
    a, b = draw.size(), draw.size()
    source = draw.choice(draw.tensor(a, b), draw.tensor(b), draw.tensor(a, 1))
    return Case(function, [draw.tensor(a, b), source], free=2)
