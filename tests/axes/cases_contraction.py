"""Cases for contractions, convolutions and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colrow.axes import Axes, Factor
from colrow.trace.records import Operation
from tests.axes.brute_force import Case, Part, Ranks, close
from tests.axes.drawing import Draw, case


@case("aten.mm", "aten.mv", "aten.dot", "aten.vdot", "aten.bmm")
def product(draw: Draw, function: Any) -> Case:
    batch, rows, inner, columns = (draw.size() for _ in range(4))
    shapes = {
        "aten::mm": ([rows, inner], [inner, columns]),
        "aten::bmm": ([batch, rows, inner], [batch, inner, columns]),
        "aten::mv": ([rows, inner], [inner]),
    }
    first, second = shapes.get(function._schema.name, ([inner], [inner]))
    free = {"aten::mm": 3, "aten::bmm": 4, "aten::mv": 2}.get(function._schema.name, 1)
    return Case(function, [draw.tensor(*first), draw.tensor(*second)], free=free)


@case("aten.addmm", "aten.baddbmm", "aten.addbmm", "aten.addmv", "aten.addr")
def added_product(draw: Draw, function: Any) -> Case:
    batch, rows, inner, columns = (draw.size() for _ in range(4))
    bias = draw.choice([rows, columns], [columns], [rows, 1], [1, columns])
    first, second, added, free = {
        "aten::addmm": ([rows, inner], [inner, columns], bias, 3),
        "aten::baddbmm": ([batch, rows, inner], [batch, inner, columns], [batch, *bias[-2:]], 4),
        "aten::addbmm": ([batch, rows, inner], [batch, inner, columns], bias, 4),
        "aten::addmv": ([rows, inner], [inner], draw.choice([rows], [1]), 2),
        "aten::addr": ([rows], [columns], [rows, columns], 2),
    }[function._schema.name]
    if function._schema.name == "aten::baddbmm":
        added = [batch, rows, columns]
    arguments = [draw.tensor(*shape) for shape in (added, first, second)]
    return Case(function, arguments, free=free)


@case("aten.linear")
def linear(draw: Draw, function: Any) -> Case:
    rows, inner, columns = (draw.size() for _ in range(3))
    bias = draw.choice(None, draw.tensor(columns))
    return Case(function, [draw.tensor(2, rows, inner), draw.tensor(columns, inner), bias], free=4)


@case("aten._trilinear")
def trilinear(draw: Draw, function: Any) -> Case:
    """As ``nn.Bilinear`` calls it: rows, outputs, and two kinds of features that are summed over."""
    rows, outputs, first, second = (draw.size() for _ in range(4))
    tensors = [draw.tensor(rows, first), draw.tensor(outputs, first, second), draw.tensor(rows, second)]
    return Case(function, [*tensors, [1, 3], [0], [1, 2], [2, 3]], free=4)


@case("aten.sum.default", "aten.nansum")
def sum_all(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    return Case(function, [draw.tensor(*shape)], free=len(shape))


@case("aten.sum.dim_IntList")
def sum_some(draw: Draw, function: Any) -> Case:
    shape = draw.sizes(2, 4)
    dimensions = draw.choice([0], [-1], [0, -1])
    return Case(function, [draw.tensor(*shape), dimensions, draw.flag()], free=len(shape))


@case("aten._grouped_mm")
def grouped_mm(draw: Draw, function: Any) -> Case:
    """By what it is documented to compute: the operator itself takes half precision only."""
    experts = draw.size()
    counts = draw.integers(4, experts)
    ends = counts.cumsum(0).to(torch.int32)
    first = draw.tensor(int(counts.sum()), draw.size())
    second = draw.tensor(experts, first.shape[1], draw.size())

    def experts_cut(ranks: Ranks) -> None:
        """A rank multiplies the rows of its experts; the others' stay zero."""
        total = torch.zeros_like(ranks.outputs[0])
        for rank in range(ranks.cut.ranks):
            weight = ranks.arguments(rank)[0][1]
            start, stop = ranks.cut.start(rank), ranks.cut.stop(rank)
            for expert in range(start, stop):
                low, high = int(ends[expert - 1]) if expert else 0, int(ends[expert])
                total[low:high] += first[low:high] @ weight[expert - start]
        close(total, ranks.outputs[0], ranks)

    return Case(function, [first, second, ends], free=3, special=experts_cut, stand_in=product_by_group)


def product_by_group(first: Tensor, second: Tensor, ends: Tensor) -> Tensor:
    """Rows up to the end of a group times the matrix of that group."""
    result = torch.zeros(first.shape[0], second.shape[2], dtype=first.dtype)
    for expert, high in enumerate(ends.tolist()):
        low = ends[expert - 1] if expert else 0
        result[low:high] = first[low:high] @ second[expert]
    return result


@case("aten.convolution", "aten._convolution")
def convolution(draw: Draw, function: Any) -> Case:
    transposed = draw.flag()
    groups = draw.choice(1, 1, 2, 3, 4)
    inside, outside = draw.size(1, 3), draw.size(1, 3)
    kernel, stride = draw.choice((1, 1), (3, 1), (2, 2))
    value = draw.tensor(2, groups * inside, 6)
    channels = (groups * inside, outside) if transposed else (groups * outside, inside)
    weight = draw.tensor(*channels, kernel)
    bias = draw.choice(None, draw.tensor(groups * outside))
    number = groups if groups == 1 else Part(groups, _groups)
    arguments = [value, weight, bias, [stride], [0], [1], transposed, [0], number]
    if function._schema.name == "aten::_convolution":
        arguments += [False, False, False, False]
    return Case(function, arguments, free=1 + (groups > 1) + (inside > 1) + (outside > 1))


def _groups(axes: Axes, operation: Operation) -> Factor:
    return axes.factors.parts(axes.dimensions(operation.inputs[0])[1], "product")[0]


ATTENTION = {
    "scaled_dot_product_attention": 0,
    "_scaled_dot_product_attention_math": 0,
    "_scaled_dot_product_flash_attention_for_cpu": 0,
}


@case(*(f"aten.{name}" for name in ATTENTION))
def attention(draw: Draw, function: Any) -> Case:
    batch, heads, queries, keys, features, width = (draw.size() for _ in range(6))
    if function._schema.name.endswith("for_cpu"):
        width = features
    query = draw.tensor(batch, heads, queries, features)
    key, value = draw.tensor(batch, heads, keys, features), draw.tensor(batch, heads, keys, width)
    mask = draw.choice(None, draw.tensor(batch, 1, queries, keys), draw.tensor(batch, heads, queries, keys))
    causal = mask is None and draw.flag()
    scale = features**-0.5
    free = 3 if causal else 4
    if function._schema.name.endswith("for_cpu"):
        keywords = {"attn_mask": mask, "scale": scale}
        return Case(function, [query, key, value, 0.0, causal], keywords, free=free - 1)
    return Case(function, [query, key, value, mask, 0.0, causal], {"scale": scale}, free=free)


@case("aten.scaled_dot_product_attention")
def grouped_attention(draw: Draw, function: Any) -> Case:
    batch, groups, repeats, queries, features = (draw.size() for _ in range(5))
    query = draw.tensor(batch, groups * repeats, queries, features)
    key, value = (draw.tensor(batch, groups, 3, features) for _ in range(2))
    keywords = {"enable_gqa": True}
    return Case(function, [query, key, value, None, 0.0, False], keywords, free=5)


@case(
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
)
def attention_kernel(draw: Draw, function: Any) -> Case:
    """Kernels of other devices, by what they are documented to compute."""
    name = function._schema.name
    batch, heads, queries, keys, features = (draw.size() for _ in range(5))
    query = draw.tensor(batch, heads, queries, features)
    key, value = (draw.tensor(batch, heads, keys, features) for _ in range(2))
    bias = draw.choice(None, draw.tensor(batch, heads, queries, keys))
    rest = {"flash": [0.0, False, False], "efficient": [bias, True, 0.0, False]}
    arguments = [query, key, value, *rest.get(name.split("_")[4], [bias, True, 0.0, False])]
    if name.endswith("overrideable"):
        arguments = [query, key, value, bias, 0.0, False]

    def stand_in(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> tuple[Tensor, ...]:
        scores = query @ key.transpose(-1, -2)
        if isinstance(rest[0], Tensor):
            scores = scores + rest[0]
        return scores.softmax(-1) @ value, scores.logsumexp(-1), torch.tensor(1)

    free = 3 + ("flash" not in name and "cudnn" not in name)
    return Case(function, arguments, free=free, stand_in=stand_in)


def check_rows(ranks: Ranks, index: Tensor, call: Any, dimensions: int) -> None:
    """A lookup: indices of other ranks' rows give zeros; the sum is the true result."""
    total = None
    for rank in range(ranks.cut.ranks):
        start, stop = ranks.cut.start(rank), ranks.cut.stop(rank)
        inside = (index >= start) & (index < stop)
        result = call(rank, torch.where(inside, index - start, 0)) * inside.reshape(
            [*inside.shape, *[1] * dimensions]
        )
        total = result if total is None else total + result
    close(total, ranks.outputs[0], ranks)
