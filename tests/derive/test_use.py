"""Uses of a cut model that its example did not show: right, or an error that says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.state import state_of
from tests.pool import Pool, worker_mesh

WIDTH = 12


class Heads(nn.Module):
    """Four heads of six features, whose number stands in the program's text."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm, self.o = nn.Linear(WIDTH, 24), nn.LayerNorm(6), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.norm(self.q(x).view(batch, tokens, 4, 6).tanh())
        heads = heads * self.norm.weight + self.norm.bias
        result: Tensor = self.o(heads.flatten(2))
        return result


class Loose(nn.Module):
    """Takes its argument by position or by name, and gives a tuple or a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.as_dictionary = nn.Linear(WIDTH, 24), nn.Linear(24, 13), False

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.up(x))
        return {"y": hidden} if self.as_dictionary else (hidden, self.down(hidden).norm())


def _input() -> Tensor:
    return torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _gradients_differ(cut: nn.Module, original: nn.Module) -> list[str]:
    state = state_of(cut)
    parts = dict(cut.named_parameters())
    found = []
    for name, parameter in original.named_parameters():
        gradient = parts[name].grad
        assert gradient is not None
        assert parameter.grad is not None
        expected = state.layouts[name].slice(parameter.grad, state.communicator.rank)
        if not torch.allclose(gradient, expected, rtol=1e-9, atol=1e-10):
            found.append(name)
    return found


def _pair(module: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = module().double()
    return original, copy.deepcopy(original)


def _copied(size: int) -> None:
    original, cut = _pair(Heads)
    colrow.parallelize(cut, worker_mesh(size), (_input(),))
    assert state_of(cut).plan.integers
    twin = copy.deepcopy(cut)
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()
    for model in (twin, original):
        model(_input()).square().sum().backward()
    assert not _gradients_differ(twin, original)
    assert all(parameter.grad is None for parameter in cut.parameters())


def _unfrozen(size: int) -> None:
    original, cut = _pair(Heads)
    cut.norm.requires_grad_(False)
    colrow.parallelize(cut, worker_mesh(size), (_input(),))
    cut.norm.requires_grad_(True)
    for model in (cut, original):
        for _ in range(2):  # accumulated
            model(_input()).square().sum().backward()
    assert not _gradients_differ(cut, original)


def _other_form(size: int) -> None:
    _, cut = _pair(Loose)
    colrow.parallelize(cut, worker_mesh(size), (_input(),), forbid=["down.weight"])
    cut(_input())
    if not state_of(cut).plan.gathers:
        return
    cut.as_dictionary = True
    with pytest.raises(ValueError, match="make the plan from an example of this form"):
        cut(_input())


@pytest.mark.parametrize("work", [_copied, _unfrozen, _other_form])
@pytest.mark.parametrize("size", [2, 3])
def test_use(ranks: Callable[[int], Pool], work: Callable[[int], None], size: int) -> None:
    ranks(size).run(work, size)
