"""The optimizer's state divided among replicas: ZeRO's first stage, by PyTorch's own optimizer for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer

from colrow.collectives import communicator
from colrow.data_shards import data_groups
from colrow.mesh import replicas, replicas_of_experts, size_of
from colrow.optimizer_parts import Group, OptimizerOfParts
from colrow.replicas import digest, first_difference
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
        ValueError: if FSDP has cut the parameters: it divides the state already; the mesh has ``ep``
            and ``model`` is not given, or has not been parallelized; or the replicas' calls differ.
    """
    groups = [dict(one) if isinstance(one, dict) else {"params": [one]} for one in parameters]
    for group in groups:
        given = group["params"]
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
    if any(data_groups(parameter) for group in groups for parameter in group["params"]):
        raise ValueError(
            "FSDP has divided these parameters, and with them the optimizer's state: use the optimizer itself"
        )
    if groups and all(group.keys() == {"params"} for group in groups):
        groups = [{"params": [parameter for group in groups for parameter in group["params"]]}]
    if size_of(mesh, "ep") == 1:
        _require_same(groups, kind, options, replicas(mesh))
        return _divided(replicas(mesh), kind, groups, options)
    if model is None:
        raise ValueError(
            "replicas along ep hold different experts, whose state is divided apart: name the model too, "
            "colrow.zero_redundancy_optimizer(parameters, kind, mesh, model=model)"
        )
    experts = {id(one.parameter) for one in placed_parameters(model) if one.experts is not None}
    _require_same(groups, kind, options, replicas(mesh), experts)

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


def _require_same(
    groups: Sequence[Group],
    kind: type[torch.optim.Optimizer],
    options: dict[str, Any],
    ranks: DeviceMesh,
    experts: Collection[int] = (),
) -> None:
    """Replicas send each other what they have updated by its place: it must be the same parameter on all.

    Parameters are told by their values, which are those of all replicas; of experts, which are other ones on
    some of the ranks, only the number is compared.

    Raises:
        ValueError: if parameters, groups or options differ; on all replicas.
    """
    described = [repr((kind.__name__, _plain(options)))]
    shared: list[Tensor] = []
    for group in groups:
        parameters = group["params"]
        shared += [one for one in parameters if id(one) not in experts and not one.is_meta]
        described.append(repr((_plain(group), [id(one) in experts for one in parameters])))
    device = shared[0].device if shared else torch.device("cpu")
    members, label = communicator(ranks), "compare the replicas' optimizers"
    text = torch.tensor([digest("\n".join(described)), len(shared)], dtype=torch.int64, device=device)
    differs = first_difference([text], members, label)
    if differs is None:
        differs = first_difference(shared, members, label)
    if differs is not None:
        raise ValueError(
            "the replicas' optimizers differ: give zero_redundancy_optimizer the same parameters in the same "
            "order, and the same groups and options, on all ranks"
        )


def _plain(options: dict[str, Any]) -> list[tuple[str, Any]]:
    """Numbers and the like, which read alike in all processes."""
    kinds = (bool, int, float, complex, str, tuple, type(None))
    return sorted((name, option) for name, option in options.items() if isinstance(option, kinds))


def _divided(
    ranks: DeviceMesh, kind: type[torch.optim.Optimizer], groups: list[Group], options: dict[str, Any]
) -> torch.optim.Optimizer:
    if ranks.size() == 1:
        return kind(groups, **options)
    return ZeroRedundancyOptimizer(groups, kind, process_group=ranks.get_group(), **options)
