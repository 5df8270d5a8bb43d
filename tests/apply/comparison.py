"""Comparing a parallelized model with the original in float64: what every model test does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import colrow
from colrow.plan import HandPlan
from colrow.state import placed_parameters, state_of
from tests.pool import worker_mesh

Batch = dict[str, Tensor]


def assemble(model: nn.Module, local: dict[str, Tensor]) -> dict[str, Tensor]:
    """Global tensors from this rank's, by parameter name; checks that replicas agree bitwise."""
    state = state_of(model)
    ranks = state.communicator
    whole = {}
    for placed in placed_parameters(model):
        if placed.name not in local:
            continue
        layout = placed.layout
        shapes = [layout.local_shape(rank) for rank in range(ranks.size)]
        flat = local[placed.name].detach().reshape(-1)
        gathered = ranks.all_gather(flat, 0, [torch.Size(shape).numel() for shape in shapes])
        parts = gathered.split([torch.Size(shape).numel() for shape in shapes])
        shards = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        if not layout.is_sharded:
            for shard in shards:
                assert torch.equal(shard, shards[0]), f"replicas of {placed.name} differ"
        whole[placed.name] = layout.assemble(shards)
    return whole


def largest_error(found: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    """Largest difference relative to the largest expected magnitude, or to ``floor`` if that is larger."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not expected.numel():
        return 0.0
    scale = max(expected.abs().max().item(), floor)
    return (found - expected).abs().max().item() / scale


def compare(
    size: int,
    build: Callable[[], nn.Module],
    plan: Callable[[nn.Module], HandPlan],
    batches: Callable[[], list[Batch]],
    tolerance: float = 1e-9,
) -> dict[str, Any]:
    """Loss, every gradient, weights after AdamW steps, outputs; returns what the last step communicated."""
    mesh = worker_mesh(size)
    original, model = build().double(), build().double()
    names = [name for name, _ in model.named_parameters()]
    identities = [id(parameter) for parameter in model.parameters()]
    assert colrow.parallelize(model, mesh, plan(model)) is model
    assert [name for name, _ in model.named_parameters()] == names
    assert [id(parameter) for parameter in model.parameters()] == identities
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3, weight_decay=0.1) for one in (original, model)]
    communicated: dict[str, Any] = {}
    for batch in batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        colrow.reset_comm_stats()
        expected, found = original(**batch), model(**batch)
        assert abs(found.loss.item() - expected.loss.item()) < tolerance * max(1, abs(expected.loss.item()))
        expected.loss.backward()
        found.loss.backward()
        stats = colrow.comm_stats(mesh)
        communicated = {
            phase: stats.where(phase=phase, operation="all_reduce").count for phase in ("forward", "backward")
        }
        communicated["total"] = stats.count
        communicated["bytes"] = stats.bytes
        communicated["stats"] = str(stats)
        expected_gradients = {n: p.grad for n, p in original.named_parameters() if p.grad is not None}
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert list(gradients) == list(expected_gradients)
        assembled = assemble(model, gradients)
        # some gradients are zero but for rounding, such as that of the keys' bias, which softmax ignores
        floor = 1e-6 * max(gradient.abs().max().item() for gradient in expected_gradients.values())
        for name, gradient in expected_gradients.items():
            error = largest_error(assembled[name], gradient, floor)
            assert error < tolerance, f"gradient of {name} is off by {error:.2e}"
        ours = colrow.clip_grad_norm_(model, 0.5)
        theirs = torch.nn.utils.clip_grad_norm_(original.parameters(), 0.5)
        assert abs(ours.item() - theirs.item()) < tolerance * max(1, theirs.item())
        for optimizer in optimizers:
            optimizer.step()
    weights = assemble(model, dict(model.named_parameters()))
    for name, parameter in original.named_parameters():
        # AdamW divides by the root of tiny second moments: a looser bound than for gradients
        error = largest_error(weights[name], parameter.detach())
        assert error < 1e-7, f"weights of {name} are off by {error:.2e}"
    last = {name: value for name, value in batches()[-1].items() if name != "labels"}
    with torch.no_grad():
        outputs = model(**last).logits
        assert largest_error(outputs, original(**last).logits) < 1e-7
    return communicated
