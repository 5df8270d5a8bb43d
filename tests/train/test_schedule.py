"""Learning rates, budgets, parameter groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from colrow.train.budget import Budget, steps_that_fit
from colrow.train.configuration import OptimizerConfiguration
from colrow.train.optimizer import build_optimizer, parameter_groups
from colrow.train.schedule import learning_rate


def test_cosine() -> None:
    optimizer = OptimizerConfiguration(learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    rates = [learning_rate(optimizer, step, 25) for step in range(25)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert rates[4] == 2.0
    assert rates[14] == pytest.approx(1.1)  # half-way between the highest and the lowest
    assert rates[24] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))


def test_constant_and_no_warmup() -> None:
    optimizer = OptimizerConfiguration(learning_rate=2.0, warmup_steps=0, schedule="constant")
    assert [learning_rate(optimizer, step, 5) for step in range(5)] == [2.0] * 5
    assert learning_rate(OptimizerConfiguration(warmup_steps=0), 0, 1) == 1e-3


def test_warmup_does_not_need_the_length() -> None:
    optimizer = OptimizerConfiguration(warmup_steps=10)
    assert all(
        learning_rate(optimizer, step, None) == learning_rate(optimizer, step, 99) for step in range(10)
    )


def test_steps_that_fit() -> None:
    # two slow ones at first, then one second each: 60 - 15 seconds are left
    durations = [5.0, 2.0] + [1.0] * 8
    assert steps_that_fit(60.0, durations, 0.0) == 45
    assert steps_that_fit(60.0, durations, 0.5) == 30
    assert steps_that_fit(3.0, durations, 0.0) == 1
    assert steps_that_fit(60.0, [2.0], 0.0) == 29


def test_given_steps_never_change() -> None:
    budget = Budget(30, None)
    assert not budget.tick(10, 100.0, None, torch.device("cpu"))  # type: ignore[arg-type]
    assert budget.steps == 30


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_weight_decay_spares_norms_biases_and_embeddings() -> None:
    model = _Tied()
    decayed, spared = parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3
    assert [id(one) for one in decayed["params"]] == [id(model.inner.weight)]
    assert spared["weight_decay"] == 0.0
    assert {id(one) for one in spared["params"]} == {
        id(one) for one in (model.embedding.weight, model.norm.weight, model.norm.bias, model.inner.bias)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_optimizer_is_adamw(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = nn.Linear(3, 3, bias=False).to(dtype)
    other = nn.Linear(3, 3, bias=False).to(dtype)
    other.load_state_dict(weight.state_dict())
    configuration = OptimizerConfiguration(learning_rate=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    ours = build_optimizer(weight, configuration)
    plain = torch.optim.AdamW(other.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    for _ in range(3):
        gradient = torch.randn(3, 3, dtype=dtype)
        weight.weight.grad, other.weight.grad = gradient.clone(), gradient.clone()
        ours.step()
        plain.step()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(weight.weight, other.weight, rtol=tolerance, atol=tolerance)
