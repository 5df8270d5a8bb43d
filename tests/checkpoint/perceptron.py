"""A small perceptron, cut over the ranks, for tests that are about files rather than about models."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.plan import AxisSpec, HandPlan, column, row

PLAN = HandPlan({"hidden": AxisSpec()}, {"0": column("hidden"), "2": row("hidden")})


def whole(hidden: int = 6) -> nn.Sequential:
    """Unsharded, the same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 4))


def cut(mesh: DeviceMesh, hidden: int = 6) -> nn.Module:
    """The first layer by columns, the second by rows."""
    return colrow.parallelize(whole(hidden), mesh, PLAN)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    """Steps on the same random data on every rank."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        (
            model(torch.randn(5, 4, generator=generator)) * torch.randn(5, 4, generator=generator)
        ).sum().backward()
        optimizer.step()
