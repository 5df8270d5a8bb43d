"""Pools, resampling and windows over the positions of images and sequences."""

from __future__ import annotations

import re

from colrow.axes.context import RuleContext
from colrow.axes.registry import rule


@rule(
    "aten.avg_pool1d",
    "aten.avg_pool2d",
    "aten.avg_pool3d",
    "aten._adaptive_avg_pool2d",
    "aten._adaptive_avg_pool3d",
    "aten.upsample_nearest1d",
    "aten.upsample_nearest2d",
    "aten.upsample_nearest3d",
    "aten._upsample_nearest_exact1d",
    "aten._upsample_nearest_exact2d",
    "aten._upsample_nearest_exact3d",
    "aten.upsample_linear1d",
    "aten.upsample_bilinear2d",
    "aten._upsample_bilinear2d_aa",
    "aten.upsample_bicubic2d",
    "aten._upsample_bicubic2d_aa",
    "aten.upsample_trilinear3d",
    "aten.reflection_pad1d",
    "aten.reflection_pad2d",
    "aten.reflection_pad3d",
    "aten.replication_pad1d",
    "aten.replication_pad2d",
    "aten.replication_pad3d",
    linear=["self", "input"],
)
def resampled(op: RuleContext) -> None:
    _positions(op)


@rule(
    "aten.max_pool1d_with_indices",
    "aten.max_pool2d_with_indices",
    "aten.max_pool3d_with_indices",
    "aten.adaptive_max_pool2d",
    "aten.adaptive_max_pool3d",
)
def max_pool(op: RuleContext) -> None:
    _positions(op)


def _positions(op: RuleContext) -> None:
    """The last one, two or three dimensions (the operator's name says) are positions."""
    found = re.search(r"([123])d", op.name)
    count = int(found.group(1)) if found else 2
    value = op.value("self") if op.optional("self") is not None else op.value("input")
    text = f"{op.name.removeprefix('aten.').lstrip('_')} over it"
    op.block_dimensions(value, range(-count, 0), text)
    for index, output in enumerate(op.outputs):
        places = [op.blocked_atom(size, text) for size in output.shape[-count:]]
        op.set_output([*op.dimensions(value)[:-count], *places], index)


@rule("aten.im2col", linear=["self"])
def im2col(op: RuleContext) -> None:
    """``[batch, channels, height, width]`` to ``[batch, channels x kernel, windows]``."""
    value = op.dimensions("self")
    if len(value) != 4:
        op.block_all("windows without a batch dimension")
        return
    text = "windows over it"
    kernel = op.outputs[0].shape[1] // value[1].size
    for factor in value[2:]:
        op.block(factor, text)
    features = op.factors.product([value[1], op.blocked_atom(kernel, text)])
    op.set_output([value[0], features, op.blocked_atom(op.outputs[0].shape[2], text)])


@rule("aten.col2im", linear=["self"])
def col2im(op: RuleContext) -> None:
    """``[batch, channels x kernel, windows]`` to ``[batch, channels, height, width]``, overlaps added."""
    value, shape = op.dimensions("self"), op.outputs[0].shape
    text = "windows put together"
    parts = None
    if len(value) == 3:
        parts = op.split(value[1], [shape[1], value[1].size // shape[1]], text)
    if parts is None:
        op.block_all(text)
        return
    for factor in (parts[1], value[2]):
        op.block(factor, text)
    op.set_output([value[0], parts[0], *(op.blocked_atom(size, text) for size in shape[2:])])


@rule("aten.grid_sampler_2d", "aten.grid_sampler_3d", linear=["input"])
def grid_sampler(op: RuleContext) -> None:
    """``input [batch, channels, height, width]`` read at ``grid [batch, rows, columns, 2]``."""
    value, grid = op.dimensions("input"), op.dimensions("grid")
    op.unify(value[0], grid[0])
    for factor in (*value[2:], grid[-1]):
        op.block(factor, "sampled at positions")
    op.set_output([*value[:2], *grid[1:-1]])


@rule("aten.pixel_shuffle", linear=["self"])
def pixel_shuffle(op: RuleContext) -> None:
    """``[..., channels x r x r, height, width]`` to ``[..., channels, height x r, width x r]``."""
    *batch, channels, height, width = op.dimensions("self")
    factor = int(op.argument("upscale_factor"))
    text = "channels that become positions"
    parts = op.split(channels, [channels.size // factor**2, factor, factor], text)
    if parts is None:
        op.block_all(text)
        return
    for part in parts[1:]:
        op.block(part, text)
    rows, columns = (op.factors.product(pair) for pair in ((height, parts[1]), (width, parts[2])))
    op.set_output([*batch, parts[0], rows, columns])


@rule("aten.pixel_unshuffle", linear=["self"])
def pixel_unshuffle(op: RuleContext) -> None:
    """``[..., channels, height x r, width x r]`` to ``[..., channels x r x r, height, width]``."""
    *batch, channels, height, width = op.dimensions("self")
    factor = int(op.argument("downscale_factor"))
    text = "positions that become channels"
    rows = op.split(height, [height.size // factor, factor], text)
    columns = op.split(width, [width.size // factor, factor], text)
    if rows is None or columns is None:
        op.block_all(text)
        return
    for part in (rows[1], columns[1]):
        op.block(part, text)
    op.set_output([*batch, op.factors.product([channels, rows[1], columns[1]]), rows[0], columns[0]])
