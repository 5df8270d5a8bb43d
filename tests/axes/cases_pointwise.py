"""Cases for pointwise operators, creation and the loss."""

from __future__ import annotations

from typing import Any

import torch

from tests.axes.brute_force import Case, Extent, Ranks, close
from tests.axes.drawing import Draw, case


def broadcast_pair(draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    a, b, c = (draw.size() for _ in range(3))
    shape = draw.choice((a, b, c), (c,), (1, c), (a, 1, 1), (b, 1))
    return draw.positive(a, b, c), draw.positive(*shape)


@case("aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Tensor", "aten.mul.Tensor", "aten.div.Tensor")
@case(
    "aten.polar",
    "aten.complex",
    "aten.max.other",
    "aten.min.other",
    "aten.floor_divide",
    "aten.div.Tensor_mode",
    "aten.add_.Tensor",
)
def two(draw: Draw, function: Any) -> Case:
    keywords = {"rounding_mode": "floor"} if function._overloadname == "Tensor_mode" else {}
    return Case(function, broadcast_pair(draw), keywords, free=3)


@case("aten.add.Scalar", "aten.mul.Scalar", "aten.div.Scalar", "aten.sub.Scalar", "aten.div.Scalar_mode")
def number(draw: Draw, function: Any) -> Case:
    keywords = {"rounding_mode": "floor"} if function._overloadname == "Scalar_mode" else {}
    shape = draw.sizes()
    return Case(function, [draw.tensor(*shape), 1.5], keywords, free=len(shape))


@case("aten.hardswish", "aten.log_sigmoid_forward", "aten.random", "aten.log_normal", "aten.geometric")
@case(
    "aten.cauchy",
    "aten.neg",
    "aten.positive",
    "aten.zero",
    "aten.fill.Scalar",
    "aten.clamp",
    "aten.bernoulli",
)
@case("aten.uniform", "aten.normal.Tensor_float", "aten.exponential", "aten.zero_")
def one(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    extra: list[Any] = {"aten::fill": [2.0], "aten::clamp": [-0.5, 0.5]}.get(function._schema.name, [])
    if function._schema.name == "aten::geometric":
        extra = [0.5]
    drawn = ("aten::random", "aten::log_normal", "aten::geometric", "aten::cauchy")
    random = function._schema.name in drawn or function._schema.name in (
        "aten::uniform",
        "aten::normal",
        "aten::exponential",
        "aten::bernoulli",
    )
    value = draw.tensor(*shape).sigmoid()
    return Case(function, [value, *extra], free=len(shape), compare=not random)


@case("aten.real", "aten.imag")
def complex_parts(draw: Draw, function: Any) -> Case:
    return Case(function, [torch.complex(draw.tensor(3, 2), draw.tensor(3, 2))], free=2)


@case("aten._prelu_kernel")
def prelu(draw: Draw, function: Any) -> Case:
    channels = draw.size()
    weight = draw.choice(draw.tensor(1, channels, 1), draw.tensor(1, 1, 1))
    return Case(function, [draw.tensor(draw.size(), channels, 3), weight], free=3)


@case("aten.rrelu_with_noise")
def noisy(draw: Draw, function: Any) -> Case:
    value = draw.tensor(draw.size(), 3)
    return Case(function, [value, torch.zeros_like(value), 0.1, 0.3, True], free=2, compare=False)


@case("aten.where.self")
def where(draw: Draw, function: Any) -> Case:
    first, second = broadcast_pair(draw)
    return Case(function, [draw.mask(*first.shape[1:]), first, second], free=3)


@case("aten.masked_fill.Scalar")
def masked_fill(draw: Draw, function: Any) -> Case:
    first, second = broadcast_pair(draw)
    return Case(function, [first, second > 0.5, draw.choice(0.0, -5.0)], free=3)


@case("aten.addcmul", "aten.addcdiv")
def three(draw: Draw, function: Any) -> Case:
    first, second = broadcast_pair(draw)
    return Case(function, [first, second, draw.positive(*second.shape)], free=3)


@case("aten.native_dropout")
def dropout(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.tensor(3, draw.size()), 0.5, True], free=2, compare=False)


@case("aten.isin.Tensor_Tensor", "aten.bucketize.Tensor", "aten.searchsorted.Tensor")
def compared(draw: Draw, function: Any) -> Case:
    value, other = draw.integers(5, 3, draw.size()).double(), torch.arange(4).double()
    pair = [other, value] if function._schema.name == "aten::searchsorted" else [value, other]
    return Case(function, pair, free=2)


@case("aten.zeros", "aten.ones", "aten.empty.memory_format", "aten.rand", "aten.randn", "aten.full")
@case("aten.randint", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty")
def created(draw: Draw, function: Any) -> Case:
    shape = [Extent(size, ~0, index) for index, size in enumerate(draw.sizes())]
    name = function._schema.name.removeprefix("aten::")
    start: list[Any] = [draw.tensor(3)] if name.startswith("new_") else [5] if name == "randint" else []
    fill = [1.5] if name.endswith("full") else []
    same = name.split("_")[-1] in ("zeros", "ones", "full")
    return Case(function, [*start, shape, *fill], compare=same)


@case("aten.empty_strided", "aten.new_empty_strided", "aten.scalar_tensor")
def created_otherwise(draw: Draw, function: Any) -> Case:
    name = function._schema.name.removeprefix("aten::")
    arguments = {"empty_strided": [[2, 3], [3, 1]], "scalar_tensor": [2.0]}
    return Case(function, arguments.get(name, [draw.tensor(3), [2, 3], [3, 1]]), compare=False)


@case("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like", "aten.rand_like")
@case("aten.randn_like", "aten.randint_like")
def created_like(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    name = function._schema.name.removeprefix("aten::")
    extra = [5] if name in ("full_like", "randint_like") else []
    same = name in ("zeros_like", "ones_like", "full_like")
    return Case(function, [draw.tensor(*shape), *extra], free=len(shape), compare=same)


@case("aten.arange", "aten.eye", "aten.linspace", "aten.logspace", "aten.tril_indices", "aten.triu_indices")
@case("aten.randperm", "aten.hann_window", "aten.hamming_window", "aten.blackman_window")
@case("aten.bartlett_window", "aten.kaiser_window")
def iota(draw: Draw, function: Any) -> Case:
    name = function._schema.name.removeprefix("aten::")
    arguments = {"linspace": [0, 1, 4], "logspace": [0, 1, 4], "tril_indices": [3, 3], "triu_indices": [3, 3]}
    return Case(function, arguments.get(name, [draw.size()]), compare=False)


@case("aten._log_softmax", "aten.log_softmax.int")
def log_softmax(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    extra = [False] if function._schema.name == "aten::_log_softmax" else []
    return Case(function, [draw.tensor(*shape), draw.dimension(len(shape)), *extra], free=len(shape) - 1)


@case("aten.nll_loss_forward", "aten.nll_loss2d_forward")
def nll_loss(draw: Draw, function: Any) -> Case:
    """Cut classes: tokens of other ranks' classes are ignored, and the sums added."""
    tokens, classes = draw.size(), draw.size(3, 5)
    places = [2, 3] if "2d" in function._schema.name else []
    reduction = draw.choice(0, 1, 2)
    target = draw.integers(classes, tokens, *places)
    target[0] = -100
    weight = draw.choice(None, draw.positive(classes))

    def classes_cut(ranks: Ranks) -> None:
        summed = [0 if reduction == 0 else 2, -100]
        true = function(*ranks.inputs[:2], weight, *summed)
        total: Any = [0, 0]
        for rank in range(ranks.cut.ranks):
            start, stop = ranks.cut.start(rank), ranks.cut.stop(rank)
            inside = (target >= start) & (target < stop)
            value, _, local, *_ = ranks.arguments(rank)[0]
            found = function(value, torch.where(inside, target - start, -100), local, *summed)
            total = [a + b for a, b in zip(total, found, strict=True)]
        for found, expected in zip(total, true, strict=True):
            close(found, expected, ranks)

    arguments = [draw.tensor(tokens, classes, *places), target, weight, reduction, -100]
    return Case(function, arguments, free=1 + (reduction != 1), special=classes_cut)


@case("aten.mse_loss", "aten.smooth_l1_loss", "aten.huber_loss", "aten.soft_margin_loss")
@case("aten.binary_cross_entropy", "aten.binary_cross_entropy_with_logits")
def pointwise_loss(draw: Draw, function: Any) -> Case:
    shape, reduction = draw.sizes(), draw.choice(0, 1, 2)
    value, target = draw.tensor(*shape).sigmoid(), draw.tensor(*shape).sigmoid()
    weights = {"aten::binary_cross_entropy": [None], "aten::binary_cross_entropy_with_logits": [None, None]}
    arguments = [value, target, *weights.get(function._schema.name, []), reduction]
    return Case(function, arguments, free=0 if reduction == 1 else len(shape))
