"""Tensors that FSDP has cut once more, over data-parallel ranks: DTensors that make up a rank's tensor."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module was made of: FSDP gives it a class of its own, derived from that."""
    kinds = (one for one in type(module).__mro__ if issubclass(one, nn.Module))
    return next(one for one in kinds if not issubclass(one, FSDPModule))


def let_go_of_gathered(module: nn.Module) -> None:
    """Let a module's parameters be the parts that FSDP trains, where a forward has left them gathered.

    The gathered ones are not those that have gradients, and their memory may go at any moment. All
    data-parallel ranks call this, or else some would gather in the next forward and some not.
    """
    if isinstance(module, FSDPModule):
        for one in module.modules():
            if isinstance(one, FSDPModule):
                one.reshard()


def refuse_inference_mode() -> None:
    """FSDP keeps the memory into which it gathers: made in inference mode, it could not be trained with.

    Raises:
        RuntimeError: within ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            'a model of colrow.data_parallel(..., "fsdp") cannot go on training after a forward within '
            "torch.inference_mode(): evaluate it within torch.no_grad()"
        )


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
