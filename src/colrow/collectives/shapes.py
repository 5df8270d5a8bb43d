"""What each rank gives to a collective and gets from it: checked sizes, and padding to equal ones."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def check_dimension(dimension: int, tensor: Tensor) -> int:
    """A dimension counted from the front.

    Raises:
        IndexError: if the tensor has no such dimension.
    """
    if not -tensor.dim() <= dimension < tensor.dim():
        raise IndexError(f"a tensor of shape {list(tensor.shape)} has no dimension {dimension}")
    return dimension % tensor.dim()


def check_sizes(sizes: Sequence[int] | None, ranks: int, equal: int) -> tuple[int, ...]:
    """One size per rank, ``equal`` on each if none are given.

    Raises:
        ValueError: if there are not as many sizes as ranks.
    """
    sizes = (equal,) * ranks if sizes is None else tuple(sizes)
    if len(sizes) != ranks:
        raise ValueError(f"got sizes of {len(sizes)} ranks for a group of {ranks}")
    return sizes


def gathered_sizes(
    shard: Tensor, dimension: int, sizes: Sequence[int] | None, rank: int, ranks: int
) -> tuple[int, ...]:
    """Extent of ``dimension`` on each rank, where ``rank`` holds ``shard``.

    Raises:
        ValueError: if the sizes do not fit the shard or the group.
    """
    held = shard.shape[dimension]
    sizes = check_sizes(sizes, ranks, held)
    if sizes[rank] != held:
        raise ValueError(f"rank {rank} holds {held}, not {sizes[rank]}")
    return sizes


def scattered_sizes(
    tensor: Tensor, dimension: int, sizes: Sequence[int] | None, ranks: int
) -> tuple[int, ...]:
    """Extent of ``dimension`` that each rank gets of ``tensor``.

    Raises:
        ValueError: if the sizes do not fit the tensor or the group.
    """
    extent = tensor.shape[dimension]
    if sizes is None and extent % ranks:
        raise ValueError(f"{extent} cannot be cut over {ranks} ranks equally: give sizes")
    sizes = check_sizes(sizes, ranks, extent // ranks)
    if sum(sizes) != extent:
        raise ValueError(f"the sizes {list(sizes)} do not add up to the extent {extent}")
    return sizes


def exchanged_shapes(
    tensor: Tensor,
    split_dimension: int,
    split_sizes: Sequence[int],
    concat_dimension: int,
    concat_sizes: Sequence[int],
    rank: int,
    ranks: int,
) -> list[list[int]]:
    """Shapes of what ``rank`` gets from each rank in an all-to-all.

    Raises:
        ValueError: if the sizes do not fit the tensor or the group.
    """
    if split_dimension == concat_dimension:
        raise ValueError(f"parts of dimension {split_dimension} cannot be joined along it: name another one")
    split_sizes = check_sizes(split_sizes, ranks, 0)
    concat_sizes = check_sizes(concat_sizes, ranks, 0)
    if (
        sum(split_sizes) != tensor.shape[split_dimension]
        or concat_sizes[rank] != tensor.shape[concat_dimension]
    ):
        raise ValueError(
            f"the sizes {list(split_sizes)} and {list(concat_sizes)} do not fit {list(tensor.shape)}"
        )
    shapes = []
    for size in concat_sizes:
        shape = list(tensor.shape)
        shape[split_dimension] = split_sizes[rank]
        shape[concat_dimension] = size
        shapes.append(shape)
    return shapes


def pad(tensor: Tensor, dimension: int, size: int) -> Tensor:
    """``tensor`` extended with zeros to ``size`` along ``dimension``."""
    missing = size - tensor.shape[dimension]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dimension] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension)


def in_a_row(tensor: Tensor, dimension: int, sizes: Sequence[int]) -> Tensor:
    """The parts of ``tensor`` along ``dimension`` one after the other, in one dimension.

    They lie so already if nothing is in front of that dimension; then this is a view.
    """
    if tensor.is_contiguous() and prod(tensor.shape[:dimension]) == 1:
        return tensor.view(-1)
    parts = tensor.split(list(sizes), dimension)
    row = tensor.new_empty(tensor.numel())
    for part, place in zip(parts, row.split([part.numel() for part in parts]), strict=True):
        place.view(part.shape).copy_(part)
    return row


def joined(row: Tensor, dimension: int, shapes: Sequence[Sequence[int]]) -> Tensor:
    """Tensors of these shapes, which lie one after the other in ``row``, as one along ``dimension``.

    A view of ``row``, if they are that already.
    """
    if prod(shapes[0][:dimension]) == 1:
        extent = sum(shape[dimension] for shape in shapes)
        return row.view([*shapes[0][:dimension], extent, *shapes[0][dimension + 1 :]])
    parts = row.split([prod(shape) for shape in shapes])
    return torch.cat([part.view(list(shape)) for part, shape in zip(parts, shapes, strict=True)], dimension)
