"""Hooks that are shown gradients and change them: they see whole gradients of whole values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.plan import Plan, derive_plan
from colrow.trace import Example, TraceError
from tests.derive.equal import WIDTH, run
from tests.pool import Pool

FEATURES = 30
CUT = ("left.up.weight", "left.down.weight")


def normalised(gradient: Tensor) -> Tensor:
    return gradient / gradient.norm()


class Branch(nn.Module):
    """A feed-forward layer that puts a hook somewhere."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.up, self.down = nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        self._hook("argument", h)
        h = h * self.norm
        self._hook("before", h)
        y = torch.tanh(self.up(h))
        self._hook("within", y)
        z: Tensor = self.down(y)
        self._hook("result", z)
        self._hook("parameter", self.norm)
        return z

    def _hook(self, where: str, tensor: Tensor) -> None:
        if where == self.where and tensor.requires_grad:
            tensor.register_hook(normalised)


class Scale(nn.Module):
    """A weight for each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.weight)


class Parallel(nn.Module):
    """Two branches of one value, and what comes after them."""

    def __init__(self, where: str = "", layers: int = 1) -> None:
        super().__init__()
        self.where = where
        self.first = Scale()
        self.left, self.right = Branch(where), Branch("")
        self.layers = nn.ModuleList(Branch(where) for _ in range(layers - 1))
        self.last = Branch("")

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        # what is added has no gradient, but makes the width of all values one
        h = self.left(h) + self.right(h) + h.detach()
        for layer in self.layers:
            h = layer(h)
        if self.where == "between":
            h.register_hook(normalised)
        return self.last(h)


def _hooked(size: int, where: str, layers: int = 1) -> Plan:
    return run(lambda: Parallel(where, layers), size)


def _notes(plan: Plan, text: str) -> list[str]:
    return [one for one in plan.notes if text in one]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("where", ["argument", "before", "result", "between"])
def test_hooks_on_whole_values(ranks: Callable[[int], Pool], where: str, size: int) -> None:
    plan = ranks(size).run(_hooked, size, where)[0]
    assert set(CUT) <= set(plan.parameters)
    assert _notes(plan, "a hook is shown the gradient of a value [2, 3, 12], which stays whole")


def _build_with_forward_hook() -> nn.Module:
    model = Parallel()
    model.first.register_forward_hook(lambda module, given, result: _hooks_result(result))
    return model


def _hooks_result(result: Tensor) -> None:
    result.register_hook(normalised)


def _forward_hook(size: int) -> Plan:
    return run(_build_with_forward_hook, size)


def test_a_hook_that_a_forward_hook_puts_on_a_result(ranks: Callable[[int], Pool]) -> None:
    """It comes after what a plan does to the result of the module."""
    assert set(CUT) <= set(ranks(2).run(_forward_hook, 2)[0].parameters)


def test_hooks_in_repeated_layers(ranks: Callable[[int], Pool]) -> None:
    plan = ranks(2).run(_hooked, 2, "argument", 4)[0]
    assert {f"layers.{layer}.up.weight" for layer in range(3)} <= set(plan.parameters)


def test_a_hook_within_a_region(ranks: Callable[[int], Pool]) -> None:
    plan = ranks(2).run(_hooked, 2, "within")[0]
    assert not set(CUT) & set(plan.parameters)
    assert "right.up.weight" in plan.parameters
    assert _notes(plan, "a hook on it is shown its gradient")


def test_a_hook_that_a_forward_puts_on_a_parameter(ranks: Callable[[int], Pool]) -> None:
    plan = ranks(2).run(_hooked, 2, "parameter")[0]
    assert "left.norm" not in {one.name for one in plan.partial_parameters}
    assert _notes(plan, "a hook is shown the gradient of left.norm, which stays whole")


def _scaled(module: nn.Module, given: Any, received: Any) -> Any:
    return tuple(None if one is None else normalised(one) for one in given)


def _scaled_before(module: nn.Module, received: Any) -> Any:
    return tuple(normalised(one) for one in received)


def _build_with_module_hooks(path: str, kind: str) -> nn.Module:
    model = Parallel()
    module = model.get_submodule(path)
    if kind == "after":
        module.register_full_backward_hook(_scaled)
    elif kind == "before":
        module.register_full_backward_pre_hook(_scaled_before)
    else:
        module.register_backward_hook(_scaled)
    return model


def _module_hooks(size: int, path: str, kind: str) -> Plan:
    return run(lambda: _build_with_module_hooks(path, kind), size)


@pytest.mark.parametrize("kind", ["after", "before"])
@pytest.mark.parametrize("path", ["first", "left", "last", "left.up", "left.down", "right"])
def test_backward_hooks_of_modules(ranks: Callable[[int], Pool], path: str, kind: str) -> None:
    plan = ranks(2).run(_module_hooks, 2, path, kind)[0]
    assert (CUT[0] in plan.parameters) == ("." not in path)
    assert "last.up.weight" in plan.parameters
    assert _notes(plan, f"{path} has backward hooks: its inputs and outputs stay whole")


def test_backward_hooks_of_the_old_kind_are_refused() -> None:
    model = _build_with_module_hooks("left", "old")
    with pytest.raises(TraceError, match=r"in left: .*register_full_backward_hook"):
        derive_plan(model, {"training": Example((torch.randn(2, 3, WIDTH),))}, 2)


def _shrink(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad /= parameter.grad.norm()


def _build_with_parameter_hooks(name: str, kind: str) -> nn.Module:
    model = Parallel()
    parameter = model.get_parameter(name)
    if kind == "gradient":
        parameter.register_hook(normalised)
    else:
        parameter.register_post_accumulate_grad_hook(_shrink)
    return model


def _parameter_hooks(size: int, name: str, kind: str) -> Plan:
    return run(lambda: _build_with_parameter_hooks(name, kind), size)


@pytest.mark.parametrize("kind", ["gradient", "accumulated"])
@pytest.mark.parametrize("name", ["left.up.weight", "left.norm", "left.down.bias", "first.weight"])
def test_hooks_of_parameters(ranks: Callable[[int], Pool], name: str, kind: str) -> None:
    plan = ranks(2).run(_parameter_hooks, 2, name, kind)[0]
    assert name not in plan.parameters
    assert "right.up.weight" in plan.parameters
    assert (CUT[1] in plan.parameters) == (name != "left.up.weight")
    assert _notes(plan, f"a hook is shown the gradient of {name}, which stays whole: put hooks on after")
