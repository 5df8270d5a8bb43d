"""Activation checkpointing of functions within forwards that a plan changes, on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import colrow
from colrow.plan import Plan
from colrow.state import state_of
from tests.apply.comparison import largest_error
from tests.derive import functions
from tests.derive.equal import TIME, WIDTH, run
from tests.pool import Pool, worker_mesh

FEATURES = 30


@dataclass(frozen=True)
class Way:
    """How functions are called: recomputed in one of PyTorch's two ways, or not."""

    recomputed: bool
    reentrant: bool

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if not self.recomputed:
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=self.reentrant)


class Attention(nn.Module):
    """Numbers in its code, norms of heads, and parts of it recomputed.

    Args:
        how: ``closure``, ``method`` or ``module``: what is checkpointed; or nothing.
        way: calls what is to be recomputed.
        dropout: probability, within the region.
    """

    def __init__(self, how: str, way: Way, dropout: float) -> None:
        super().__init__()
        self.how, self.way, self.dropout = how, way, dropout
        self.qkv, self.out = nn.Linear(WIDTH, 3 * 24), nn.Linear(24, WIDTH)
        self.norm = nn.Parameter(torch.rand(6) + 0.5)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self._attend(x)

        if self.how == "closure":
            y: Tensor = self.way(inner, x)
        elif self.how == "method":
            y = self.way(self._attend, x)
        elif self.how == "twice":
            q, k, v = self._heads(x)
            q, k = (self.way(self._normed, each) for each in (q, k))
            y = self.way(self._mixed, q, k, v)
        elif self.how == "counted":
            qkv = self.qkv(x)
            # the numbers of a line in the program's text differ from pass to pass of it
            y = self.way(self._rest, self._part(qkv, 0), qkv)
        elif self.how == "nested":
            y = self.way(self._nested, x)
        else:
            y = self._attend(x)
        result: Tensor = self.out(y)
        return result

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        # numbers of the program's text, which are changed at each of these calls
        parts = [part.view(x.shape[0], TIME, 4, 6) for part in self.qkv(x).split(24, -1)]
        return tuple(part.transpose(1, 2) for part in parts)

    def _part(self, qkv: Tensor, number: int) -> Tensor:
        return qkv.narrow(-1, 24 * number, 24).view(qkv.shape[0], TIME, 4, 6).transpose(1, 2)

    def _rest(self, q: Tensor, qkv: Tensor) -> Tensor:
        self.passes += 1
        k, v = (self._part(qkv, number) for number in (1, 2))
        return self._mixed(self._normed(q), self._normed(k), v)

    def _normed(self, each: Tensor) -> Tensor:
        return F.normalize(each, dim=-1) * self.norm

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.dropout((q @ k.transpose(-1, -2)).softmax(-1), self.dropout, self.training)
        return (scores @ v).transpose(1, 2).reshape(-1, TIME, 24)

    def _attend(self, x: Tensor) -> Tensor:
        self.passes += 1
        q, k, v = self._heads(x)
        return self._mixed(self._normed(q), self._normed(k), v)

    def _nested(self, x: Tensor) -> Tensor:
        result: Tensor = self.way(self._attend, torch.tanh(x))
        return torch.tanh(result)


class Mixed(nn.Module):
    """A feed-forward layer by functions alone: an entry and an exit at calls, a bias that one rank adds."""

    def __init__(self, how: str, way: Way) -> None:
        super().__init__()
        self.how, self.way = how, way
        self.up, self.down = (
            nn.Parameter(torch.randn(shape)) for shape in ((FEATURES, WIDTH), (WIDTH, FEATURES))
        )
        self.bias = nn.Parameter(torch.rand(WIDTH))
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        function: Any = self._inner if self.how == "method" else lambda h: self._inner(h)
        if not self.how:
            return h + self._inner(h)
        result: Tensor = self.way(function, h)
        return h + result

    def _inner(self, h: Tensor) -> Tensor:
        g = functions.Clamped.apply(h, 0.05) * self.scale
        y = functions.Rounded.apply(torch.tanh(F.linear(g, self.up)))
        # squared: the sum over ranks has to be there by then
        return F.linear(y, self.down, self.bias).square()


class Block(nn.Module):
    """Recomputed as a whole, or its parts are by themselves."""

    def __init__(self, how: str, way: Way, dropout: float) -> None:
        super().__init__()
        own = "" if how in ("module", "forward") else how
        self.how, self.way = how, way
        self.dropout = dropout
        self.attention = Attention(own, way, dropout)
        self.mixed = Mixed(own, way)

    def forward(self, x: Tensor) -> Tensor:
        if self.how in ("module", "forward"):
            first: Any = self.attention if self.how == "module" else self.attention.forward
            second: Any = self.mixed if self.how == "module" else self.mixed.forward
            y = self.way(first, x)
            x = x + F.dropout(y, self.dropout, self.training)
            result: Tensor = self.way(second, x)
            return result
        result = self.mixed(x + F.dropout(self.attention(x), self.dropout, self.training))
        return result


def _recomputed(size: int, how: str, reentrant: bool) -> tuple[Plan, bool]:
    built: list[Block] = []

    def build() -> nn.Module:
        built.append(Block(how, Way(True, reentrant), 0.0))
        return built[-1]

    plan = run(build, size)
    return plan, all(block.attention.passes > 2 for block in built)


KINDS = ["closure", "method", "twice", "counted", "nested", "module", "forward"]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", KINDS)
def test_functions_are_recomputed_as_they_were_computed(
    ranks: Callable[[int], Pool], how: str, reentrant: bool, size: int
) -> None:
    plan, again = ranks(size).run(_recomputed, size, how, reentrant)[0]
    assert again or how == "twice"
    assert plan.integers, "this is about numbers at calls"
    assert {"attention.qkv.weight", "mixed.up"} <= set(plan.parameters)
    assert "attention.norm" in {one.name for one in plan.partial_parameters}
    assert "mixed.bias" in {one.name for one in plan.once_parameters}


def _with_dropout(size: int, how: str, reentrant: bool) -> None:
    x = torch.randn(2, TIME, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(2, TIME, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for recomputed in (False, True):
        torch.manual_seed(1)
        model = Block(how, Way(recomputed, reentrant), 0.4).double()
        colrow.parallelize(model, worker_mesh(size), {"x": x})
        assert "attention.qkv.weight" in state_of(model).plan.parameters
        given = x.clone().requires_grad_()
        torch.manual_seed(3)
        result = model(given)
        drawn = torch.rand(1)
        result.backward(cotangent)
        gradients = [one.grad for one in model.parameters()]
        found.append([result.detach(), drawn, given.grad, *gradients])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or largest_error(other, one) < 1e-10


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", KINDS)
def test_random_numbers_are_drawn_again(ranks: Callable[[int], Pool], how: str, reentrant: bool) -> None:
    """Ranks draw different ones in the region: what to compare with is the cut model, not recomputed."""
    ranks(2).run(_with_dropout, 2, how, reentrant)
