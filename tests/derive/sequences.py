"""Models and comparisons for tests of sequences that are cut between regions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import colrow
from colrow.plan import Plan
from colrow.state import state_of
from tests.apply.comparison import assemble, largest_error
from tests.pool import worker_mesh

WIDTH, FEATURES = 12, 20


class Block(nn.Module):
    """Norm, feed-forward and residual, with something done between."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.up, self.down = nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, WIDTH)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.tanh(self.up(self.norm(x))))
        y = y * (1.0 + self.scale)  # computed from a parameter, which is none
        match self.between:
            case "cumulative":
                y = y.cumsum(1)
            case "length":
                y = y / y.size(1)
            case "mean":
                y = y - y.mean(1, keepdim=True)
            case "flattened":
                y = y.view(-1, WIDTH).tanh().view(x.shape)
            case "shifted":
                y = y + torch.cat([y[:, :1], y[:, :-1]], 1)
            case "positions":
                y = y * torch.arange(y.size(1), dtype=y.dtype)[None, :, None]
        return x + y


class Mixing(nn.Module):
    """Attention with one head less than nothing to cut: its values are cut inside."""

    def __init__(self, sequence: int) -> None:
        super().__init__()
        self.sequence = sequence
        self.value, self.out = nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.sequence == 0 else x
        weights = (x @ x.transpose(1, 2)).softmax(-1)
        y = self.out(weights @ self.value(x))
        return y.transpose(0, 1) if self.sequence == 0 else y


class Stack(nn.Module):
    """Mixing and feed-forward blocks in turn; the sequence is dimension 1, or 0."""

    def __init__(self, between: str = "", sequence: int = 1, recompute: bool = False, depth: int = 2) -> None:
        super().__init__()
        self.mixing = nn.ModuleList(Mixing(sequence) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(between) for _ in range(depth))
        self.first, self.last = nn.Parameter(torch.rand(WIDTH)), nn.LayerNorm(WIDTH)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.first
        for mixing, block in zip(self.mixing, self.blocks, strict=True):
            h = h + mixing(h)
            h = checkpoint(block, h, use_reentrant=False) if self.recompute else block(h)
        return self.last(h)


def pair(build: Callable[[], nn.Module], size: int, length: int = 8, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    original = build().double()
    cut = copy.deepcopy(original)
    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    colrow.parallelize(cut, worker_mesh(size), {"x": x}, **{"sequence": True, **options})
    return original, cut


def plan_of(cut: nn.Module) -> Plan:
    plan = state_of(cut).plan
    assert isinstance(plan, Plan)
    return plan


def same(original: nn.Module, cut: nn.Module, lengths: list[int], together: bool = False) -> None:
    """Results and gradients; with ``together`` all forwards come before all backwards."""
    generator = torch.Generator().manual_seed(2)

    def given(length: int) -> Tensor:
        return torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)

    work = [(given(length), given(length)) for length in lengths]
    for model in (original, cut):
        waiting = []
        for x, cotangent in work:
            result = model(x)
            waiting.append((result, cotangent))
            if not together:
                result.backward(cotangent)
        for result, cotangent in waiting if together else ():
            result.backward(cotangent)
    with torch.no_grad():
        for x, _ in work:
            assert largest_error(cut(x), original(x)) < 1e-12
    expected = {name: one.grad for name, one in original.named_parameters() if one.grad is not None}
    local = {name: one.grad for name, one in cut.named_parameters() if one.grad is not None}
    assert list(local) == list(expected)
    # what a mean is taken off of loses its bias, whose gradient is zero but for rounding
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in assemble(cut, local).items():
        assert largest_error(gradient, expected[name], floor) < 1e-10, name
