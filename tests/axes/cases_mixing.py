"""Cases for operators that mix along a dimension: softmax, norms, reductions, pools."""

from __future__ import annotations

from typing import Any

from colrow.axes import Axes, Factor
from colrow.trace.records import Operation
from tests.axes.brute_force import Case, Extent, Part
from tests.axes.drawing import Draw, case


@case("aten._softmax", "aten._safe_softmax", "aten.softmax.int", "aten.cumprod", "aten.cumsum")
@case("aten.logcumsumexp", "aten.cummax", "aten.cummin", "aten.argsort", "aten.sort", "aten.sort.stable")
def along_one(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    arguments: list[Any] = [draw.tensor(*shape), draw.dimension(len(shape))]
    if function._schema.name == "aten::_softmax":
        arguments.append(False)
    if function._overloadname == "stable":
        return Case(function, arguments[:1], {"stable": True, "dim": arguments[1]}, free=len(shape) - 1)
    return Case(function, arguments, free=len(shape) - 1)


@case("aten.flip", "aten.roll", "aten.tril", "aten.triu")
def moved(draw: Draw, function: Any) -> Case:
    a, b, c = (draw.size() for _ in range(3))
    arguments = {"aten::flip": [[-1, 1]], "aten::roll": [[1, 1], [-1, 1]]}
    return Case(function, [draw.tensor(a, b, c), *arguments.get(function._schema.name, [1])], free=1)


@case("aten.roll")
def rolled_flat(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.tensor(3, 4), [2]])


@case("aten.topk", "aten.kthvalue", "aten.mode", "aten.median.dim", "aten.nanmedian.dim")
def topk(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    dimension = draw.dimension(len(shape))
    given = (
        [dimension] if function._overloadname == "dim" or "mode" in function._schema.name else [2, dimension]
    )
    return Case(function, [draw.tensor(*shape), *given], free=len(shape) - 1)


@case("aten.multinomial")
def multinomial(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.positive(draw.size(), 4), 2], free=1, compare=False)


@case("aten.mean.default", "aten.amax", "aten.amin", "aten.aminmax", "aten.max.default", "aten.min.default")
@case("aten.argmax", "aten.argmin", "aten.any.default", "aten.all.default", "aten.var.correction")
@case("aten.var_mean.correction", "aten.std.correction", "aten.std_mean.correction", "aten.prod.default")
@case("aten.norm.Scalar", "aten.linalg_vector_norm", "aten.count_nonzero.dim_IntList", "aten.median")
@case("aten.nanmedian")
def reduced_all(draw: Draw, function: Any) -> Case:
    shape = draw.sizes()
    extra = [[]] if function._schema.name == "aten::count_nonzero" else []
    return Case(function, [draw.tensor(*shape), *extra])


@case("aten._is_all_true", "aten._is_any_true")
def reduced_mask(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.mask(*draw.sizes())])


@case("aten.mean.dim", "aten.amax", "aten.amin", "aten.logsumexp", "aten.var.correction")
@case("aten.var_mean.correction", "aten.std.correction", "aten.std_mean.correction", "aten.any.dims")
@case("aten.all.dims", "aten.linalg_vector_norm", "aten.norm.ScalarOpt_dim", "aten.var.dim", "aten.std.dim")
def reduced_some(draw: Draw, function: Any) -> Case:
    shape = draw.sizes(2, 4)
    chosen = draw.choice([0], [-1], [0, -1])
    names = [argument.name for argument in function._schema.arguments]
    arguments: list[Any] = [draw.tensor(*shape), *[2] * (names[1] in ("p", "ord"))]
    return Case(function, [*arguments, chosen], {"keepdim": draw.flag()}, free=len(shape) - len(chosen))


@case("aten.max.dim", "aten.min.dim", "aten.argmax", "aten.argmin", "aten.prod.dim_int", "aten.any.dim")
@case("aten.all.dim", "aten.aminmax")
def reduced_one(draw: Draw, function: Any) -> Case:
    shape = draw.sizes(2, 4)
    value, dimension, keep = draw.tensor(*shape), draw.dimension(len(shape)), draw.flag()
    return Case(function, [value], {"dim": dimension, "keepdim": keep}, free=len(shape) - 1)


@case("aten._fft_r2c", "aten._fft_c2c", "aten._fft_c2r")
def fourier(draw: Draw, function: Any) -> Case:
    import torch

    name = function._schema.name
    value = draw.tensor(3, draw.size(), 4)
    given = value if name.endswith("r2c") else torch.complex(value, draw.tensor(*value.shape))
    last: Any = {"aten::_fft_r2c": draw.flag(), "aten::_fft_c2c": True, "aten::_fft_c2r": 6}[name]
    return Case(function, [given, [2], 0, last], free=2)


@case("aten.native_layer_norm", "aten.layer_norm", "aten._fused_rms_norm", "aten.rms_norm")
def layer_norm(draw: Draw, function: Any) -> Case:
    shape = draw.sizes(2, 4)
    normalized = shape[-draw.size(1, len(shape) - 1) :]
    weight = draw.choice(None, draw.tensor(*normalized))
    bias = [] if "rms" in function._schema.name else [draw.choice(None, draw.tensor(*normalized))]
    arguments = [draw.tensor(*shape), normalized, weight, *bias, 1e-5]
    return Case(function, arguments, free=len(shape) - len(normalized))


@case("aten.native_group_norm")
def group_norm(draw: Draw, function: Any) -> Case:
    batch, groups, inside, length = (draw.size() for _ in range(4))
    channels = groups * inside
    weight = draw.choice(None, draw.tensor(channels))
    number = Part(groups, _groups)
    sizes = [Extent(batch, 0, 0), Extent(channels, 0, 1), length]
    arguments = [draw.tensor(batch, channels, length), weight, weight, *sizes, number, 1e-5]
    return Case(function, arguments, free=2)


def _groups(axes: Axes, operation: Operation) -> Factor:
    return axes.factors.parts(axes.dimensions(operation.inputs[0])[1], "product")[0]


@case("aten.native_batch_norm", "aten._native_batch_norm_legit", "aten._native_batch_norm_legit_no_training")
@case("aten._batch_norm_with_update", "aten._batch_norm_no_update")
def batch_norm(draw: Draw, function: Any) -> Case:
    batch, channels = draw.size(), draw.size()
    weight, bias, mean = (draw.tensor(channels) for _ in range(3))
    arguments = [draw.tensor(batch, channels, 3), weight, bias, mean, draw.positive(channels)]
    names = [argument.name for argument in function._schema.arguments]
    training = draw.flag()
    evaluation = [training] if "training" in names else []
    free = 2 if not training and evaluation else 1
    return Case(function, [*arguments, *evaluation, 0.1, 1e-5], free=free)


SPATIAL: dict[str, list[Any]] = {
    "avg_pool1d": [[2]],
    "avg_pool2d": [[2, 2]],
    "avg_pool3d": [[2, 2, 2]],
    "_adaptive_avg_pool2d": [[2, 2]],
    "_adaptive_avg_pool3d": [[2, 2, 2]],
    "upsample_nearest1d": [[6]],
    "upsample_nearest2d": [[6, 6]],
    "upsample_nearest3d": [[6, 6, 6]],
    "_upsample_nearest_exact1d": [[6]],
    "_upsample_nearest_exact2d": [[6, 6]],
    "_upsample_nearest_exact3d": [[6, 6, 6]],
    "upsample_linear1d": [[6], False],
    "upsample_bilinear2d": [[6, 6], False],
    "_upsample_bilinear2d_aa": [[6, 6], False],
    "upsample_bicubic2d": [[6, 6], False],
    "_upsample_bicubic2d_aa": [[6, 6], False],
    "upsample_trilinear3d": [[6, 6, 6], False],
    "reflection_pad1d": [[1, 1]],
    "reflection_pad2d": [[1, 1, 1, 1]],
    "reflection_pad3d": [[1, 1, 1, 1, 1, 1]],
    "replication_pad1d": [[1, 1]],
    "replication_pad2d": [[1, 1, 1, 1]],
    "replication_pad3d": [[1, 1, 1, 1, 1, 1]],
    "max_pool1d_with_indices": [[2]],
    "max_pool2d_with_indices": [[2, 2]],
    "max_pool3d_with_indices": [[2, 2, 2]],
    "adaptive_max_pool2d": [[2, 2]],
    "adaptive_max_pool3d": [[2, 2, 2]],
}


@case(*(f"aten.{name}" for name in SPATIAL))
def spatial(draw: Draw, function: Any) -> Case:
    name = function._schema.name.removeprefix("aten::")
    places = next(int(digit) for digit in "123" if f"{digit}d" in name)
    shape = [draw.size(), draw.size(), *[4] * places]
    return Case(function, [draw.tensor(*shape), *SPATIAL[name]], free=2)


@case("aten.upsample_nearest2d.vec", "aten.upsample_bilinear2d.vec")
def upsample(draw: Draw, function: Any) -> Case:
    aligned = [False] if "bilinear" in function._schema.name else []
    return Case(function, [draw.tensor(2, draw.size(), 4, 4), None, *aligned, [2.0, 2.0]], free=2)


@case("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixels(draw: Draw, function: Any) -> Case:
    a, b, c = (draw.size() for _ in range(3))
    shape = [2, 4 * a, b, c] if function._schema.name == "aten::pixel_shuffle" else [2, a, 2 * b, 2 * c]
    return Case(function, [draw.tensor(*shape), 2], free=4)


@case("aten.glu")
def glu(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.tensor(draw.size(), 2 * draw.size(), 3), draw.choice(1, -2)], free=3)


@case("aten._weight_norm_interface")
def weight_norm(draw: Draw, function: Any) -> Case:
    a, b, c = (draw.size() for _ in range(3))
    dimension = draw.choice(0, 2)
    scale = draw.tensor(a, 1, 1) if dimension == 0 else draw.tensor(1, 1, c)
    return Case(function, [draw.tensor(a, b, c), scale, dimension], free=1)


@case("aten.im2col")
def im2col(draw: Draw, function: Any) -> Case:
    value = draw.tensor(draw.size(), draw.size(), 4, 4)
    return Case(function, [value, [2, 2], [1, 1], [0, 0], [2, 2]], free=2)


@case("aten.col2im")
def col2im(draw: Draw, function: Any) -> Case:
    value = draw.tensor(draw.size(), 4 * draw.size(), 4)
    return Case(function, [value, [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]], free=2)


@case("aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sampler(draw: Draw, function: Any) -> Case:
    batch, places = draw.size(), int(function._schema.name[-2])
    grid = draw.tensor(batch, *(draw.size() for _ in range(places)), places)
    value = draw.tensor(batch, draw.size(), *[4] * places)
    return Case(function, [value, grid, 0, 0, False], free=2 + places)


@case("aten.linalg_cross")
def cross(draw: Draw, function: Any) -> Case:
    a, b = draw.size(), draw.size()
    return Case(function, [draw.tensor(a, 3, b), draw.tensor(a, 3, b)], {"dim": draw.choice(1, -2)}, free=2)


@case("aten._cdist_forward", "aten._euclidean_dist")
def distances(draw: Draw, function: Any) -> Case:
    batch = [draw.size()]
    rest = [2.0, None] if function._schema.name == "aten::_cdist_forward" else []
    pair = [draw.tensor(*batch, draw.size(), 3), draw.tensor(*batch, draw.size(), 3)]
    return Case(function, [*pair, *rest], free=3)


@case("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(draw: Draw, function: Any) -> Case:
    return Case(function, [draw.tensor(draw.size(), 4, draw.size(), 3), 2], free=3)
