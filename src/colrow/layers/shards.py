"""Replacing a parameter's data by this rank's shard."""

from __future__ import annotations

from torch import Tensor

from colrow.layout import Cut, DimensionLayout, TensorLayout


def axis_layout(
    size: int, ranks: int, layout: DimensionLayout | None, cut: Cut | None
) -> tuple[DimensionLayout, Cut]:
    """The layout and cut of a dimension of ``size``; by default every index is a unit, cut evenly."""
    layout = layout or DimensionLayout.contiguous(size)
    if layout.size != size:
        raise ValueError(f"a layout of {layout.size} indices does not fit a dimension of {size}")
    cut = cut or Cut.balanced(layout.units, ranks)
    if cut.ranks != ranks or cut.units != layout.units:
        raise ValueError(
            f"a cut of {cut.units} units over {cut.ranks} ranks does not fit "
            f"a layout of {layout.units} units and a group of {ranks} ranks"
        )
    return layout, cut


def shard_parameter(parameter: Tensor | None, layout: TensorLayout, rank: int) -> None:
    """Replace the data by the shard of ``rank``, in place: the Parameter object stays.

    A parameter that has the local shape already is left alone: tied parameters are met more than once.
    """
    if parameter is None or not layout.is_sharded:
        return
    shape = tuple(parameter.shape)
    if shape != layout.shape:
        if shape == layout.local_shape(rank):
            return
        raise ValueError(f"expected a parameter of shape {list(layout.shape)}, got {list(shape)}")
    if layout.local_shape(rank) == layout.shape:
        return
    parameter.data = layout.slice(parameter.data, rank)
    parameter.grad = None
