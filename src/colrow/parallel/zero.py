"""The optimizer's state divided among replicas: ZeRO's first stage, by PyTorch's own optimizer for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer

from colrow.data_shards import data_groups
from colrow.mesh import replicas, size_of


def zero_redundancy_optimizer(
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
    kind: type[torch.optim.Optimizer],
    mesh: DeviceMesh,
    **options: Any,
) -> ZeroRedundancyOptimizer:
    """An optimizer whose state the replicas divide among them, each for some of the parameters.

    Each replica updates its parameters and sends them to the others. For models from :func:`data_parallel`
    with ``"ddp"``; :func:`colrow.save_optimizer` and :func:`colrow.load_optimizer` take it at any layout.
    ZeRO, Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, stage 1.

    Args:
        parameters: of the model, or groups of them with options of their own.
        kind: of optimizer, such as ``torch.optim.AdamW``: any that updates parameters one by one.
        mesh: with a dimension ``dp``. Every rank of the job calls this.
        options: of the optimizer, such as ``lr=1e-3``.

    Raises:
        ValueError: if FSDP has cut the parameters: it divides the state already; or the mesh has ``ep``.
    """
    if size_of(mesh, "ep") > 1:
        raise ValueError(
            "replicas along ep hold different experts, which one optimizer cannot divide: use "
            "colrow.data_parallel(model, mesh, 'fsdp') and the optimizer itself"
        )
    groups = [one if isinstance(one, dict) else {"params": [one]} for one in parameters]
    if any(data_groups(parameter) for group in groups for parameter in group["params"]):
        raise ValueError(
            "FSDP has divided these parameters, and with them the optimizer's state: use the optimizer itself"
        )
    if groups and all(group.keys() == {"params"} for group in groups):
        groups = [{"params": [parameter for group in groups for parameter in group["params"]]}]
    return ZeroRedundancyOptimizer(groups, kind, process_group=replicas(mesh).get_group(), **options)
