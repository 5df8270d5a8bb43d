"""Cases for operators that index."""

from __future__ import annotations

from typing import Any

import torch

from tests.axes.brute_force import Case, Offset, Ranks
from tests.axes.cases_contraction import check_rows
from tests.axes.drawing import Draw, case


@case("aten.embedding")
def embedding(draw: Draw, function: Any) -> Case:
    rows, width = draw.size(3, 5), draw.size()
    index = draw.integers(rows, *draw.sizes(1, 2))

    def rows_cut(ranks: Ranks) -> None:
        check_rows(
            ranks, index, lambda rank, local: function(ranks.arguments(rank)[0][0], local), dimensions=1
        )

    return Case(function, [draw.tensor(rows, width), index], free=2 + index.dim(), special=rows_cut)


@case("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(draw: Draw, function: Any) -> Case:
    rows, mode = draw.size(3, 5), draw.choice(0, 1, 2)
    arguments = [draw.integers(rows, 5), torch.tensor([0, 2]), False, mode]
    return Case(function, [draw.tensor(rows, draw.size()), *arguments], free=1)


@case("aten.index_select")
def index_select(draw: Draw, function: Any) -> Case:
    rows, width = draw.size(3, 5), draw.size()
    index = draw.integers(rows, draw.size())

    def rows_cut(ranks: Ranks) -> None:
        check_rows(
            ranks, index, lambda rank, local: function(ranks.arguments(rank)[0][0], 0, local), dimensions=1
        )

    return Case(function, [draw.tensor(rows, width), 0, index], free=3, special=rows_cut)


@case("aten.gather")
def gather(draw: Draw, function: Any) -> Case:
    a, b, c = (draw.size() for _ in range(3))
    count = draw.size()
    index = draw.integers(b, draw.choice(a, a - 1), count, c)
    return Case(function, [draw.tensor(a, b, c), draw.choice(1, -2), index], free=2)


@case("aten.scatter.src", "aten.scatter_add", "aten.scatter.value", "aten.scatter_reduce.two")
@case("aten.scatter.reduce", "aten.scatter_add_")
def scatter(draw: Draw, function: Any) -> Case:
    a, b, c = (draw.size() for _ in range(3))
    index = torch.stack([torch.randperm(b) for _ in range(a * c)]).reshape(a, c, b).transpose(1, 2)
    index = index[:, : draw.size(1, b)].contiguous()
    source: Any = draw.tensor(*index.shape)
    arguments = [draw.tensor(a, b, c), 1, index, source]
    if function._overloadname == "value":
        arguments[3] = draw.choice(0.0, 2.5)
    elif function._overloadname == "two":
        arguments.append("amax")
    elif function._overloadname == "reduce":
        return Case(function, arguments, {"reduce": "multiply"}, free=2)
    return Case(function, arguments, free=2)


@case("aten.index.Tensor", "aten._unsafe_index.Tensor")
def index(draw: Draw, function: Any) -> Case:
    a, b, c = (draw.size() for _ in range(3))
    value = draw.tensor(a, b, c)
    i, j = draw.integers(a, draw.size()), draw.integers(b, draw.size(), 1)
    k = draw.integers(c, i.shape[0])
    choices = [
        (value, [i], 3),
        (value, [None, j], 3),
        (value, [i, j], 3),
        (value, [i, None, k], 2),
        (value, [None, None, torch.tensor([c - 1])], 2),
        (value, [draw.mask(a)], 2),
        (value, [None, draw.mask(b, c)], 1),
    ]
    masks = function._schema.name == "aten::index"
    chosen, indices, free = choices[draw.size(0, len(choices) - 1 if masks else len(choices) - 3)]
    return Case(function, [chosen, indices], free=free)


@case("aten.index_put", "aten.index_put_", "aten._index_put_impl", "aten._unsafe_index_put")
def index_put(draw: Draw, function: Any) -> Case:
    a, b, c = draw.size(3, 4), draw.size(), draw.size()
    i = torch.randperm(a)[: draw.size(2, 3)]
    value, full = draw.tensor(a, b, c), draw.tensor(len(i), b, c)
    written = draw.choice(full, draw.tensor(c), draw.tensor(1))
    accumulate = draw.flag()
    if draw.flag():
        return Case(function, [value, [draw.mask(a, b)], draw.tensor(c), accumulate])
    return Case(function, [value, [i], written, accumulate], free=2)


@case(
    "aten.index_add", "aten.index_add_", "aten.index_copy", "aten.index_reduce", "aten.index_fill.int_Scalar"
)
def written_slices(draw: Draw, function: Any) -> Case:
    a, b, c = draw.size(3, 4), draw.size(), draw.size()
    i = torch.randperm(b)[: draw.size(1, b)]
    arguments: list[Any] = [draw.tensor(a, b, c), draw.choice(1, -2), i]
    if function._schema.name == "aten::index_fill":
        arguments.append(draw.choice(0.0, 1.5))
    else:
        arguments.append(draw.tensor(a, len(i), c))
    if function._schema.name == "aten::index_reduce":
        arguments.append("amax")
    return Case(function, arguments, free=2)


@case("aten.select_scatter")
def select_scatter(draw: Draw, function: Any) -> Case:
    a, b, c = draw.size(), draw.size(4, 5), draw.size()
    arguments = [draw.tensor(a, b, c), draw.tensor(a, c), 1, Offset(draw.size(0, b - 1), 0, 1)]
    return Case(function, arguments, free=3)


@case("aten.slice_scatter")
def slice_scatter(draw: Draw, function: Any) -> Case:
    a, b = draw.size(), draw.size(4, 6)
    start = draw.size(0, 1)
    stop = draw.size(start + 2, b)
    step = draw.choice(1, 1, 2)
    source = draw.tensor(a, len(range(start, stop, step)))
    bounds = [Offset(start, 0, 1), Offset(stop, 0, 1)]
    return Case(function, [draw.tensor(a, b), source, 1, *bounds, step], free=1 + (step == 1))


@case(
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
    "aten.repeat_interleave.Tensor",
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.is_nonzero",
    "aten._assert_async",
)
def by_values(draw: Draw, function: Any) -> Case:
    value, mask, index = draw.tensor(4, 3), draw.mask(4, 3), draw.integers(3, 5)
    name = function._schema.name.removeprefix("aten::")
    arguments = {
        "masked_select": [value, mask],
        "masked_scatter": [value, mask, draw.tensor(12)],
        "where": [mask],
        "take": [value, index],
        "put": [value, index, draw.tensor(5)],
        "bincount": [index],
        "unique_dim": [value, 0],
        "repeat_interleave": [index],
        "_local_scalar_dense": [draw.tensor(1)],
        "equal": [value, value],
        "is_nonzero": [draw.tensor(1)],
        "_assert_async": [torch.ones(1)],
    }.get(name, [value])
    return Case(function, arguments)
