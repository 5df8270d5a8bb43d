"""Tensors that FSDP has cut once more, over data-parallel ranks: DTensors that make up a rank's tensor."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its part, if data-parallel ranks share it; else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def joined(tensor: Tensor) -> Tensor:
    """This rank's tensor, put together from the parts of data-parallel ranks: all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def data_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of ranks among which a tensor is cut; none if it is held whole."""
    if not isinstance(tensor, DTensor):
        return ()
    return tuple(
        tensor.device_mesh.get_group(dimension)
        for dimension, placement in enumerate(tensor.placements)
        if placement.is_shard()
    )


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This rank's part of ``tensor``, cut as ``other`` is. Every rank has all of it; nothing is sent."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
