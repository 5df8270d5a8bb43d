"""A model over real ranks beside the same model whole, in float64: results and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import colrow
from colrow.plan import Plan
from colrow.state import state_of
from tests.apply.comparison import assemble, largest_error
from tests.pool import worker_mesh

BATCH, TIME, WIDTH = 2, 3, 12


def run(
    build: Callable[[], nn.Module],
    size: int,
    passes: int = 2,
    around: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Plan:
    """On one of ``size`` ranks: check it and return the plan.

    Args:
        build: makes the model, the same on every rank; it is called twice.
        passes: forward and backward passes, whose gradients add up.
        around: wraps both models before they run.
    """
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(build().double())
    original, model = models
    generator = torch.Generator().manual_seed(2)
    shape = (BATCH, TIME, WIDTH)
    colrow.parallelize(model, worker_mesh(size), {"x": torch.randn(shape, dtype=torch.float64)})
    for _ in range(passes):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        cotangent = torch.randn(shape, generator=generator, dtype=torch.float64)
        results, gradients = [], []
        for one in (around(original), around(model)):
            given = x.clone().requires_grad_()
            torch.manual_seed(3)
            result: Tensor = one(given)
            result.backward(cotangent)
            results.append(result.detach())
            assert given.grad is not None
            gradients.append(given.grad)
        assert largest_error(results[1], results[0]) < 1e-10
        assert largest_error(gradients[1], gradients[0]) < 1e-10, "gradient of the input"
    expected = {name: one.grad for name, one in original.named_parameters() if one.grad is not None}
    local = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert list(local) == list(expected)
    # a gradient may be zero but for rounding, as that of the keys' bias, which softmax ignores
    floor = 1e-6 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in assemble(model, local).items():
        error = largest_error(gradient, expected[name], floor)
        assert error < 1e-10, f"gradient of {name} is off by {error:.1e}"
    plan = state_of(model).plan
    assert isinstance(plan, Plan)
    return plan
