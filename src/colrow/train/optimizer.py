"""AdamW over a cut model: plain PyTorch, since the parameters are plain local tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.train.configuration import OptimizerConfiguration


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: with weight decay, and without.

    Without are biases and the weights of norms (all of one dimension) and embeddings (also an output layer
    that shares an embedding's weight). A stage of a pipeline may have no parameter of one kind: that group is
    empty, since all stages save the same groups.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            spared = parameter.dim() < 2 or id(parameter) in embeddings
            groups[spared]["params"].append(parameter)
    return groups


def resume_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read the state of a checkpoint; its options stay those that the configuration now says.

    Args:
        model: whose parameters it updates.
        optimizer: from :func:`build_optimizer`.
        folder: that :func:`colrow.save_optimizer` wrote.
    """
    chosen = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    colrow.load_optimizer(model, optimizer, folder)
    for group, options in zip(optimizer.param_groups, chosen, strict=True):
        group.update(options)


def build_optimizer(
    model: nn.Module, configuration: OptimizerConfiguration, mesh: DeviceMesh | None = None
) -> torch.optim.Optimizer:
    """AdamW, in its fused form: one pass over each parameter. Replicas of ``mesh`` divide its state."""
    groups = parameter_groups(model, configuration.weight_decay)
    options: dict[str, Any] = {
        "lr": configuration.learning_rate,
        "betas": configuration.betas,
        "eps": configuration.eps,
        "fused": True,
    }
    if mesh is not None:
        return colrow.zero_redundancy_optimizer(groups, torch.optim.AdamW, mesh, model=model, **options)
    return torch.optim.AdamW(groups, **options)
