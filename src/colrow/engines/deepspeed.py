"""DeepSpeed's ZeRO, first and second stage: what it asks to know about ranks that hold parts of one model."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.collectives import communicator
from colrow.engines.places import require_replicas_and_parts
from colrow.layout import TensorLayout
from colrow.mesh import root_mesh
from colrow.replicas import check_equal_weights
from colrow.state import parallel_module, placed_parameters, state_of

LARGEST_STAGE = 2


class ModelParallelUnit:
    """The groups of a mesh under the names that Megatron gave them, by which DeepSpeed asks for them.

    Args:
        mesh: from :func:`colrow.init_mesh`, of ``dp`` and ``tp``.

    Raises:
        ValueError: if the mesh has other dimensions.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        require_replicas_and_parts(mesh, "DeepSpeed")
        self._replicas, self._parts = mesh["dp"], mesh["tp"]

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks of this rank's replica."""
        return self._parts.get_group()

    def get_model_parallel_rank(self) -> int:
        """This rank among those of its replica."""
        return int(self._parts.get_local_rank())

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks of a replica."""
        return self._parts.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same parts."""
        return self._replicas.get_group()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """The same as numbers within the job."""
        return dist.get_process_group_ranks(self._replicas.get_group())

    def get_data_parallel_rank(self) -> int:
        """The number of this rank's replica."""
        return int(self._replicas.get_local_rank())

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return self._replicas.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        """The first rank of this rank's replica, as a number within the job."""
        return dist.get_process_group_ranks(self._parts.get_group())[0]


def mpu(mesh: DeviceMesh) -> ModelParallelUnit:
    """What ``deepspeed.initialize`` takes as ``mpu``; :func:`initialize` passes it on by itself."""
    return ModelParallelUnit(mesh)


def count_once(model: nn.Module) -> None:
    """Mark parameters so that DeepSpeed's norm counts each element of the whole model once.

    DeepSpeed counts what ``tensor_model_parallel`` marks on every rank of a replica, the rest on the first.

    Raises:
        ValueError: if some rank holds a parameter of which a part, but not all, is another's to count; on all
            ranks.
    """
    ranks = state_of(model).communicator
    for placed in placed_parameters(model):
        shares = [_share(placed.layout, rank) for rank in range(ranks.size)]
        if placed.layout.is_shared and any(0 < share < 1 for share in shares):
            raise ValueError(
                f"several ranks hold parts of {placed.name}, and DeepSpeed's norm counts what a rank holds "
                "of a parameter wholly or not at all: cut over another number of ranks, or keep it whole "
                f"(forbid={placed.name!r})"
            )
        is_counted = placed.layout.is_sharded and shares[ranks.rank] > 0
        placed.parameter.tensor_model_parallel = is_counted  # type: ignore[attr-defined]


def _share(layout: TensorLayout, rank: int) -> float:
    """How much of what a rank holds counts as its own: all, unless a rank before it holds the same."""
    held = torch.empty(layout.local_shape(rank), device="meta")
    return sum(part.numel() for part in layout.owned(held, rank)) / max(1, held.numel())


def initialize(model: nn.Module, config: dict[str, Any], **options: Any) -> Any:
    """``deepspeed.initialize`` for a cut model.

    Batches differ between replicas only, gradients are averaged over them, ``gradient_clipping`` takes the
    norm of the whole model. Write it by ``colrow.save_pretrained(engine.module, folder)``. DeepSpeed's own
    checkpoints can be resumed at the same layout.

    Args:
        model: cut over a mesh of ``dp`` and ``tp``, with the same weights on all replicas.
        config: of DeepSpeed; batch sizes are those of a replica.
        options: further ones of ``deepspeed.initialize``.

    Returns:
        What it returns: engine, optimizer, data loader and schedule.

    Raises:
        ValueError: if the model has not been parallelized, its mesh has other dimensions, the configuration
            asks for ZeRO's third stage or for tensor parallelism of its own, or see :func:`count_once`.
        PlanError: if the replicas' weights differ.
    """
    mesh = root_mesh(state_of(model).mesh)
    unit = mpu(mesh)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in range(1, LARGEST_STAGE + 1):
        raise ValueError(
            f"zero_optimization.stage must be 1 or {LARGEST_STAGE} for a cut model, not {stage}: instead of "
            "the third there is colrow.data_parallel(model, mesh, 'fsdp'), without ZeRO "
            "colrow.data_parallel(model, mesh)"
        )
    if "tensor_parallel" in config:
        raise ValueError("the model is cut already: leave out DeepSpeed's tensor_parallel")
    if mesh.device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    check_equal_weights(parallel_module(model), communicator(mesh["dp"]))
    count_once(model)
    import deepspeed

    return deepspeed.initialize(model=model, config=config, mpu=unit, **options)
