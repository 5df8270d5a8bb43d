"""Parameters that are exchanged for others, by the model's own forward and by its caller."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import colrow
from colrow.state import state_of
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.pool import Pool, worker_mesh

Ranks = Callable[[int], Pool]
WIDTH, HEADS = 12, 4


class Attention(nn.Module):
    """Heads whose queries and keys go through one norm, of the queries with exchanged weights."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.other, self.way = nn.LayerNorm(WIDTH // HEADS), nn.Parameter(torch.rand(3)), way

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor
        if self.way == "recomputed":
            result = checkpoint(self._attend, x, use_reentrant=False)
        else:
            result = self._attend(x)
        return result

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        if self.way == "foreign":
            q = functional_call(self.norm, {"weight": self.other + 1}, (q,))
        elif self.way == "outside":
            q = self.norm(q) * self.other
        else:
            weights = {"weight": self.norm.weight * 2 + self.other, "bias": self.norm.bias.exp()}
            q = functional_call(self.norm, weights, (q,))
        scores = (q @ self.norm(k).mT).softmax(-1)
        result: Tensor = self.o((scores @ v).transpose(1, 2).flatten(2))
        return result


class Around(nn.Module):
    """Exchanges a weight of a layer around its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.weight = Attention("own"), nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = functional_call(self.attention, {"norm.weight": self.weight * 2}, (x,))
        return result


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{way: lambda way=way: Attention(way) for way in ("own", "foreign", "recomputed")},  # type: ignore[misc]
    "around": Around,
}


def _verified(size: int, name: str) -> Report:
    torch.manual_seed(1)
    examples = {"training": Example((), {"x": torch.randn(2, 5, WIDTH)})}
    return verify_on_ranks(MODELS[name](), examples, worker_mesh(size))


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_exchanges_weights(ranks: Ranks, name: str) -> None:
    report = ranks(3).run(_verified, 3, name)[0]
    report.raise_if_different()
    assert any("norm" in one.name or "other" in one.name for one in report.plan.partial_parameters)


def _called(size: int) -> dict[str, float]:
    """Errors of gradients of weights that a caller gives to the model."""
    torch.manual_seed(1)
    original = Attention("outside").double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    cut = colrow.parallelize(copy.deepcopy(original), worker_mesh(size), {"x": x})
    gradients: list[dict[str, Any]] = []
    for model in (original, cut):
        given = {name: (one.detach() * 1.5).requires_grad_() for name, one in model.named_parameters()}
        functional_call(model, given, (x,)).square().sum().backward()
        gradients.append({name: one.grad for name, one in given.items()})
    layouts, rank = state_of(cut).layouts, state_of(cut).communicator.rank
    whole, parts = gradients
    return {name: float((layouts[name].slice(whole[name], rank) - parts[name]).abs().max()) for name in whole}


def test_a_caller_exchanges_weights(ranks: Ranks) -> None:
    for errors in ranks(2).run(_called, 2):
        assert max(errors.values()) < 1e-10
