"""The optimizer's state divided among replicas: ZeRO's first stage, by PyTorch's own optimizer for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer

from colrow.data_shards import data_groups
from colrow.mesh import replicas, replicas_of_experts, size_of
from colrow.optimizer_parts import Group, OptimizerOfParts
from colrow.state import placed_parameters


def zero_redundancy_optimizer(
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
    kind: type[torch.optim.Optimizer],
    mesh: DeviceMesh,
    *,
    model: nn.Module | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer whose state the replicas divide among them, each for some of the parameters.

    Each replica updates its parameters and sends them to the others. For models from :func:`data_parallel`
    with ``"ddp"``; :func:`colrow.save_optimizer` and :func:`colrow.load_optimizer` take it at any layout.
    ZeRO, Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, stage 1.

    Args:
        parameters: of the model, or groups of them with options of their own.
        kind: of optimizer, such as ``torch.optim.AdamW``: any that updates parameters one by one.
        mesh: with a dimension ``dp``. Every rank of the job calls this.
        model: what :func:`data_parallel` returned; needed if the mesh has ``ep``. The state of its experts is
            divided among the ranks that hold the same ones, that of everything else among all replicas.
        options: of the optimizer, such as ``lr=1e-3``.

    Returns:
        PyTorch's ``ZeroRedundancyOptimizer``; over ``ep`` one that updates by two optimizers, and has the
        groups of both.

    Raises:
        ValueError: if FSDP has cut the parameters: it divides the state already; or the mesh has ``ep``
            and ``model`` is not given, or has not been parallelized.
    """
    groups = [one if isinstance(one, dict) else {"params": [one]} for one in parameters]
    if any(data_groups(parameter) for group in groups for parameter in group["params"]):
        raise ValueError(
            "FSDP has divided these parameters, and with them the optimizer's state: use the optimizer itself"
        )
    if groups and all(group.keys() == {"params"} for group in groups):
        groups = [{"params": [parameter for group in groups for parameter in group["params"]]}]
    if size_of(mesh, "ep") == 1:
        return _divided(replicas(mesh), kind, groups, options)
    if model is None:
        raise ValueError(
            "replicas along ep hold different experts, whose state is divided apart: name the model too, "
            "colrow.zero_redundancy_optimizer(parameters, kind, mesh, model=model)"
        )
    experts = {id(one.parameter) for one in placed_parameters(model) if one.experts is not None}

    def over(ranks: DeviceMesh) -> Callable[[list[Group], dict[str, Any]], torch.optim.Optimizer]:
        return lambda own, common: _divided(ranks, kind, own, common)

    return OptimizerOfParts(
        groups,
        options,
        [
            (lambda one: id(one) not in experts, over(replicas(mesh))),
            (lambda one: id(one) in experts, over(replicas_of_experts(mesh))),
        ],
    )


def _divided(
    ranks: DeviceMesh, kind: type[torch.optim.Optimizer], groups: list[Group], options: dict[str, Any]
) -> torch.optim.Optimizer:
    if ranks.size() == 1:
        return kind(groups, **options)
    return ZeroRedundancyOptimizer(groups, kind, process_group=ranks.get_group(), **options)
