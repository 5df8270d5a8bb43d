"""Training with experts over ``ep`` beside one process that has all data, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.apply.unshard import all_experts, gather_whole
from colrow.checkpoint.pretrained import load_weights
from colrow.collectives import communicator
from colrow.data_shards import held, joined
from colrow.mesh import replicas, replicas_of_experts
from colrow.optimizer_parts import OptimizerOfParts
from colrow.state import placed_parameters, state_of
from colrow.verify.precision import one_precision
from tests.apply.comparison import largest_error
from tests.parallel.experts.models import VOCABULARY
from tests.pool import worker_mesh

LENGTH, MICRO_BATCHES, IGNORED = 7, 2, -100

Way = Literal["ddp", "zero1", "fsdp"]
"""How replicas train together."""

Batch = list[tuple[Tensor, Tensor]]
"""Ids and labels of the micro-batches of a replica."""


def batch_of(step: int, replica: int) -> Batch:
    """Other numbers of rows on each replica, and of labels in each micro-batch."""
    generator = torch.Generator().manual_seed(100 * step + replica)
    batch = []
    for index in range(MICRO_BATCHES):
        ids = torch.randint(VOCABULARY, (1 + (replica + index) % 3, LENGTH), generator=generator)
        labels = ids.clone()
        labels[0, 2 + index + replica % 2 :] = IGNORED
        batch.append((ids, labels))
    return batch


def _tokens(labels: Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum())


def whole(model: nn.Module, parameter_or_gradient: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """By name the global tensors of what the ranks have of each parameter."""
    state = state_of(model)
    found = {}
    for placed in placed_parameters(model):
        local, layout = joined(parameter_or_gradient(placed.parameter)).detach(), placed.layout
        if placed.experts is not None:
            local, layout = all_experts(local, layout, placed.experts, placed.name)
        found[placed.name] = gather_whole(local, layout, state.communicator, placed.name)
    return found


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Which there is."""
    assert parameter.grad is not None
    return parameter.grad


def _same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(one.abs().max().item() for one in expected.values())
    for name, one in expected.items():
        error = largest_error(found[name], one, floor)
        assert error < 1e-9, f"{what} {name} is off by {error:.2e}"


def cut(build: Callable[[], nn.Module], tp: int, dp: int, ep: int, kind: Way) -> tuple[nn.Module, DeviceMesh]:
    """A model with its experts over ``ep``, cut over ``tp``, and its mesh."""
    mesh = worker_mesh(tp=tp, dp=dp, ep=ep)
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    model = colrow.parallelize(build(), mesh, {"input_ids": ids, "labels": ids})
    return colrow.data_parallel(model, mesh, "fsdp" if kind == "fsdp" else "ddp"), mesh


def _adam(model: nn.Module, mesh: DeviceMesh, kind: Way, rate: float) -> torch.optim.Optimizer:
    """With ZeRO, tensors of one dimension are a group of their own, that holds no experts."""
    if kind != "zero1":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": []}]
    for one in model.parameters():
        groups[one.dim() < 2]["params"].append(one)
    options = {"lr": rate, "weight_decay": 0.1}
    return colrow.zero_redundancy_optimizer(groups, torch.optim.AdamW, mesh, model=model, **options)


def train_alike(
    build: Callable[[], nn.Module], tp: int, dp: int, ep: int, kind: Way, folder: Path | None
) -> None:
    """Two steps: losses, every gradient, the norm, parameters; then files that go on in another layout."""
    with one_precision():
        original = build()
        reference = torch.optim.AdamW(original.parameters(), lr=1e-3, weight_decay=0.1)
        model, mesh = cut(build, tp, dp, ep, kind)
        optimizer = _adam(model, mesh, kind, 1e-3)
        count = colrow.count_parameters(model)
        assert count.total == sum(one.numel() for one in original.parameters())
        assert count.local < count.total
        for step in range(2):
            compare_step(original, model, mesh, reference, optimizer, step)
        colrow.check_replicas(model)
        if kind == "zero1":
            _check_divided(model, optimizer, mesh)
        _same(whole(model, lambda one: one), dict(original.named_parameters()), "parameter")
        if folder is not None:
            colrow.save_pretrained(model, folder)
            colrow.save_optimizer(model, optimizer, folder / "optimizer")


def _check_divided(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> None:
    """Every element of this rank's parameters has its moment on one of those who hold the parameter."""
    assert isinstance(optimizer, OptimizerOfParts)
    moments = [
        sum(one["exp_avg"].numel() for one in getattr(part, "optim", part).state.values())
        for part in optimizer.parts
    ]
    held_here = {True: 0, False: 0}
    for one in placed_parameters(model):
        held_here[one.experts is not None] += one.parameter.numel()
    for own, of_experts, ranks in zip(
        moments, (False, True), (replicas(mesh), replicas_of_experts(mesh)), strict=True
    ):
        assert communicator(ranks).all_reduce(torch.tensor(own)).item() == held_here[of_experts]
        assert own < held_here[of_experts] or ranks.size() == 1


def compare_step(
    original: nn.Module,
    model: nn.Module,
    mesh: DeviceMesh,
    reference: torch.optim.Optimizer,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    """One step of both: the mean over the tokens of all replicas."""
    everyone = replicas(mesh)
    batches = [batch_of(step, replica) for replica in range(everyone.size())]
    expected = gradients_whole(original, reference, batches)
    mine = batches[everyone.get_local_rank()]
    weight = colrow.token_weight(mesh, sum(_tokens(labels) for _, labels in mine))
    optimizer.zero_grad()
    found = torch.zeros((), dtype=torch.float64)
    for index, (ids, labels) in enumerate(mine):
        with nullcontext() if index == MICRO_BATCHES - 1 else colrow.no_gradient_sync(model):
            loss = model(input_ids=ids, labels=labels).loss * _tokens(labels) * weight
            loss.backward()
            found += loss.detach() / everyone.size()
    ranks = state_of(model).communicator
    torch.distributed.all_reduce(found)
    assert math.isclose(found.item() / ranks.size, expected, rel_tol=1e-9)

    gradients = {name: gradient_of(one) for name, one in original.named_parameters()}
    _same(whole(model, gradient_of), gradients, "gradient of")
    norm = nn.utils.clip_grad_norm_(original.parameters(), 0.5)
    assert math.isclose(float(colrow.clip_grad_norm_(model, 0.5)), float(norm), rel_tol=1e-9)
    reference.step()
    optimizer.step()


def resume_alike(
    build: Callable[[], nn.Module], tp: int, dp: int, ep: int, kind: Way, folder: Path, before: int
) -> None:
    """What :func:`train_alike` has saved goes on in another layout; ``before`` replicas had trained it."""
    with one_precision():
        original = build()
        reference = torch.optim.AdamW(original.parameters(), lr=1e-3, weight_decay=0.1)
        for step in range(2):
            step_whole(original, reference, [batch_of(step, replica) for replica in range(before)])
        model, mesh = cut(build, tp, dp, ep, kind)
        with torch.no_grad():
            for parameter in model.parameters():
                held(parameter).zero_()
        load_weights(model, folder)
        optimizer = _adam(model, mesh, kind, 1.0)
        colrow.load_optimizer(model, optimizer, folder / "optimizer")
        compare_step(original, model, mesh, reference, optimizer, 2)
        _same(whole(model, lambda one: one), dict(original.named_parameters()), "parameter")


def step_whole(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> float:
    """A step on all data with gradients clipped; the loss, the mean over all tokens."""
    loss = gradients_whole(model, optimizer, batches)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


def gradients_whole(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> float:
    """The gradients of the mean over all tokens, and the loss."""
    total = sum(_tokens(labels) for batch in batches for _, labels in batch)
    optimizer.zero_grad()
    whole_loss = 0.0
    for ids, labels in (one for batch in batches for one in batch):
        loss = model(input_ids=ids, labels=labels).loss * _tokens(labels) / total
        loss.backward()
        whole_loss += loss.item()
    return whole_loss
