"""Deriving a model's plan and proving it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.plan import Plan, hand_plan
from colrow.state import placed_parameters, state_of
from colrow.trace.tree import tensors_by_path

TOLERANCE = 1e-6


def derive(model: nn.Module, inputs: dict[str, Any], ranks: int) -> Plan:
    """The plan of ``model`` for so many ranks."""
    return hand_plan(model).resolve(model, ranks)


def verify(model: nn.Module, inputs: dict[str, Any], plan: Plan, mesh: DeviceMesh) -> str:
    """Where the model that is cut by ``plan`` first differs from ``model``; empty if nowhere."""
    cut = colrow.parallelize(copy.deepcopy(model), mesh, plan)
    expected = tensors_by_path(model(**copy.deepcopy(inputs)), inside_objects=True)
    found = dict(tensors_by_path(cut(**copy.deepcopy(inputs)), inside_objects=True))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for path, true in expected:
        ours = found[path]
        if not _close(ours, true):
            return f"output {path}"
        if true.requires_grad:
            cotangent = torch.randn(true.shape, generator=generator, dtype=true.dtype)
            losses.append(((true * cotangent).sum(), (ours * cotangent).sum()))
    for pair in zip(*losses, strict=True):
        torch.stack(pair).sum().backward()
    true_gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    state = state_of(cut)
    for placed in placed_parameters(cut):
        true_gradient = true_gradients[placed.name]
        if placed.parameter.grad is None or true_gradient is None:
            continue
        shapes = [placed.layout.local_shape(rank) for rank in range(state.communicator.size)]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        flat = state.communicator.all_gather(placed.parameter.grad.reshape(-1), 0, sizes)
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        if not _close(placed.layout.assemble(parts), true_gradient):
            return f"gradient of {placed.name}"
    return ""


def _close(found: Tensor, true: Tensor) -> bool:
    return found.shape == true.shape and torch.allclose(found, true, rtol=TOLERANCE, atol=TOLERANCE)
