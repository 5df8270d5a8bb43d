"""Copied layers: their records must equal those of layers that ran."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from colrow.trace import Trace, trace
from tests.trace.compare import assert_same
from tests.trace.models import Nano, ids


def copies(record: Trace) -> list[str]:
    return [call.path for call in record.modules if call.copy_of is not None]


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_copies_equal_what_would_have_run(mode: str) -> None:
    model = Nano(layers=5)
    keywords = {"ids": ids(), "labels": ids()}
    copied = trace(model, (), keywords, mode=mode)
    full = trace(model, (), keywords, mode=mode, copy_layers=False)
    assert {path.split(".")[1] for path in copies(copied)} == {"1", "2", "3", "4"}
    assert not copies(full)
    assert_same(copied, full)


class Layer(nn.Module):
    def __init__(self, width: int = 8, number: int = 0, **attributes: object) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.number = number
        for name, item in attributes.items():
            setattr(self, name, item)

    def forward(self, x: Tensor, mask: Tensor, state: object = None) -> Tensor:
        if getattr(self, "extra", 0):
            x = x + 1
        if bool(mask.all()):
            x = x * 2
        if isinstance(state, list | Holder):
            state.append(x)
        if hasattr(self, "outer"):
            x = x + self.outer()
        if hasattr(self, "seen"):
            self.seen = x
        return self.linear(x)


class Holder:
    def __init__(self) -> None:
        self.items: list[Tensor] = []

    def append(self, tensor: Tensor) -> None:
        self.items.append(tensor)


class Stack(nn.Module):
    def __init__(self, layers: list[Layer], masks: Tensor | None = None, state: object = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.masks = masks
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            mask = torch.ones(3, dtype=torch.bool) if self.masks is None else self.masks[index]
            x = layer(x, mask, state=self.state)
        return x


def layers_copied(model: Stack) -> list[int]:
    copied = trace(model, (torch.randn(2, 8),))
    assert_same(copied, trace(model, (torch.randn(2, 8),), copy_layers=False))
    return sorted({int(path.split(".")[1]) for path in copies(copied)})


def test_layers_that_differ_run() -> None:
    plain = [Layer(number=index) for index in range(4)]
    assert layers_copied(Stack(plain)) == [1, 2, 3]
    assert layers_copied(Stack([Layer(number=0), Layer(number=7), Layer(number=7)])) == [2]
    assert layers_copied(Stack([Layer(), Layer(extra=1), Layer(), Layer(extra=1)])) == [2, 3]
    frozen = [Layer(), Layer(), Layer()]
    frozen[1].requires_grad_(False)
    assert layers_copied(Stack(frozen)) == [2]
    tied = [Layer(), Layer(), Layer()]
    tied[2].linear.weight = tied[0].linear.weight
    assert layers_copied(Stack(tied)) == [1, 2]


def test_arguments_with_other_content_run() -> None:
    masks = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    assert layers_copied(Stack([Layer() for _ in range(4)], masks)) == [2, 3]


def test_layers_that_share_changing_state_run() -> None:
    assert layers_copied(Stack([Layer() for _ in range(3)], state=Holder())) == []


def test_layers_that_read_their_surroundings_run() -> None:
    outside = [nn.Parameter(torch.zeros(8)) for _ in range(3)]
    model = Stack([Layer() for _ in range(3)])
    for index, (layer, parameter) in enumerate(zip(model.layers, outside, strict=True)):
        model.register_parameter(f"outside{index}", parameter)
        layer.outer = Outer(parameter)
    record = trace(model, (torch.randn(2, 8),))
    assert not copies(record)


def test_layers_that_keep_something_run() -> None:
    layers = [Layer() for _ in range(3)]
    for layer in layers:
        layer.seen = None
    assert layers_copied(Stack(layers)) == []


class Settings:
    def __init__(self, width: int) -> None:
        self.width = width


def test_things_that_layers_share_have_one_name() -> None:
    class Sharing(nn.Module):
        def __init__(self, activation: nn.Module, settings: Settings, sizes: list[int]) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.activation = activation
            self.settings = settings
            self.own = Settings(4)
            self.sizes = sizes

        def forward(self, x: Tensor) -> Tensor:
            y = self.activation(self.linear(x)).view(-1, self.settings.width, 2)
            return y.reshape(-1, self.own.width, 2).view(-1, *self.sizes).flatten(1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            activation, settings, sizes = nn.GELU(), Settings(4), [2, 4]
            self.layers = nn.ModuleList(Sharing(activation, settings, sizes) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    copied = trace(Model(), (torch.randn(2, 8),))
    assert len(copies(copied)) == 3 * 3
    assert_same(copied, trace(Model(), (torch.randn(2, 8),), copy_layers=False))
    assert copied.modules[-1].path == "layers.0.activation"


class Outer:
    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def __call__(self) -> nn.Parameter:
        return self.parameter
