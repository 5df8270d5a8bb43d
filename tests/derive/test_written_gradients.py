"""Functions of the program with a backward of their own, on real ranks beside the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.plan import Plan, derive_plan
from colrow.trace import Example
from tests.derive import functions
from tests.derive.equal import BATCH, TIME, WIDTH, run
from tests.pool import Pool

FEATURES = 30
swiglu = functions.SwiGLU.apply  # bound long before anything listens


class Branch(nn.Module):
    """A feed-forward layer with something before its region and something within."""

    def __init__(self, before: str, within: str) -> None:
        super().__init__()
        self.before, self.within = before, within
        self.up, self.down = nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, WIDTH)
        self.gate = nn.Linear(WIDTH, FEATURES) if within == "swiglu" else None
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, h: Tensor) -> Tensor:
        h = self._apply_function(self.before, h)
        y = swiglu(self.gate(h), self.up(h)) if self.gate is not None else torch.tanh(self.up(h))
        return self.down(self._apply_function(self.within, y))

    def _apply_function(self, name: str, h: Tensor) -> Any:
        match name:
            case "normalised":
                return functions.Normalised.apply(h)
            case "operator":
                return functions.normalised(h)
            case "divided":
                return functions.Divided.apply(h, 1 / FEATURES)
            case "clamped":
                return functions.Clamped.apply(h, 0.05)
            case "reversed":
                return functions.Reversed.apply(h, 0.3)
            case "rounded":
                return functions.Rounded.apply(h)
            case "signed":
                return functions.Signed.apply(h)
            case "rmsnorm":
                return functions.RMSNorm.apply(h, self.norm, 1e-6)
            case "heads":
                heads = h.view(*h.shape[:-1], -1, 5)
                return functions.HeadsNormalised.apply(heads).flatten(-2)
            case "loss":
                return functions.WithLoss.apply(h, h.square().mean().view(1))
            case "unknown":
                return functions.Unknown.apply(h, self)
        return h


class Parallel(nn.Module):
    """Two branches of one value: their gradients meet there, and are summed there if that may be."""

    def __init__(self, before: str = "", within: str = "", layers: int = 1) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.left = nn.ModuleList(Branch(before, within) for _ in range(layers))
        self.right = nn.ModuleList(Branch("", "") for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x * self.first)
        for left, right in zip(self.left, self.right, strict=True):
            h = left(h) + right(h)
        return h


def _equal(size: int, before: str, within: str, layers: int = 1) -> Plan:
    return run(lambda: Parallel(before, within, layers), size)


CUT = ("left.0.up.weight", "left.0.down.weight")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("before", ["normalised", "clamped", "loss"])
def test_gradients_are_summed_before_what_is_not_linear(
    ranks: Callable[[int], Pool], before: str, size: int
) -> None:
    plan = ranks(size).run(_equal, size, before, "")[0]
    assert set(CUT) <= set(plan.parameters)
    (note,) = [one for one in plan.notes if "is not linear in the gradient" in one]
    assert "test_written_gradients.py" in note
    assert "left.0" in note


def test_an_operator_without_a_rule_gets_whole_gradients(ranks: Callable[[int], Pool]) -> None:
    plan = ranks(2).run(_equal, 2, "operator", "")[0]
    assert set(CUT) <= set(plan.parameters)
    assert [one for one in plan.notes if "no rule for colrow_tests.normalised" in one]


def test_what_is_linear_and_elementwise_is_passed(ranks: Callable[[int], Pool]) -> None:
    plain = ranks(2).run(_equal, 2, "", "")[0]
    for before in ("reversed", "rounded", "signed"):
        plan = ranks(2).run(_equal, 2, before, "")[0]
        assert set(CUT) <= set(plan.parameters)
        assert len(plan.entries) == len(plain.entries) == 1
        assert not [one for one in plan.notes if "backward" in one]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("within", ["clamped", "reversed", "rounded", "signed", "swiglu"])
def test_what_is_elementwise_is_cut(ranks: Callable[[int], Pool], within: str, size: int) -> None:
    plan = ranks(size).run(_equal, size, "", within)[0]
    assert set(CUT) <= set(plan.parameters)
    assert not [one for one in plan.notes if "stays whole" in one and "backward" in one]


@pytest.mark.parametrize("within", ["normalised", "unknown", "divided"])
def test_what_needs_the_whole_stays_whole(ranks: Callable[[int], Pool], within: str) -> None:
    plan = ranks(2).run(_equal, 2, "", within)[0]
    assert not set(CUT) & set(plan.parameters)
    assert "right.0.up.weight" in plan.parameters
    text = {
        "normalised": "the backward of Normalised is not the derivative of its forward, and needs",
        "divided": "the backward of Divided is not the derivative of its forward, and needs",
        "unknown": "the backward of Unknown is not known: it is given a Branch",
    }[within]
    assert [one for one in plan.notes if one.startswith(f"axis of {FEATURES}: ") and text in one]


def test_a_norm_with_its_derivative_is_like_any_other(ranks: Callable[[int], Pool]) -> None:
    plan = ranks(2).run(_equal, 2, "rmsnorm", "")[0]
    assert set(CUT) <= set(plan.parameters)
    assert len(plan.entries) == 1, "one entry serves both branches"
    assert "left.0.norm" in {one.name for one in plan.partial_parameters}


def test_heads_are_cut_where_each_is_on_its_own(ranks: Callable[[int], Pool]) -> None:
    plan = ranks(2).run(_equal, 2, "", "heads")[0]
    sharding = plan.parameters["left.0.up.weight"]
    assert plan.axes[sharding.axis].cut.counts == (3, 3), "heads of five features"


def test_repeated_layers(ranks: Callable[[int], Pool]) -> None:
    plan = ranks(2).run(_equal, 2, "normalised", "clamped", 3)[0]
    assert {f"left.{layer}.up.weight" for layer in range(3)} <= set(plan.parameters)


class Fused(nn.Module):
    """Functions that multiply with weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.up, self.down = nn.Linear(WIDTH, FEATURES, bias=False), nn.Linear(FEATURES, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        if self.kind == "normed":
            y = torch.tanh(functions.NormedLinear.apply(h, self.scale, self.up.weight))
            return h + self.down(y)
        if self.kind == "quantised":
            y = torch.tanh(nn.functional.linear(h, functions.Rounded.apply(self.up.weight)))
            return h + self.down(y)
        y = torch.tanh(self.up(h))
        return h + functions.LinearTanh.apply(y, self.down.weight)


def _fused(size: int, kind: str) -> Plan:
    return run(lambda: Fused(kind), size)


@pytest.mark.parametrize("kind", ["normed", "quantised"])
def test_functions_of_cut_weights(ranks: Callable[[int], Pool], kind: str) -> None:
    plan = ranks(2).run(_fused, 2, kind)[0]
    assert {"up.weight", "down.weight"} <= set(plan.parameters)
    if kind == "normed":
        assert "scale" in {one.name for one in plan.partial_parameters}


def test_nothing_is_done_within_a_function(ranks: Callable[[int], Pool]) -> None:
    """Its partial sums would have to be reduced in its forward, and its backward would not know."""
    plan = ranks(2).run(_fused, 2, "computed again")[0]
    features = plan.parameters.get("down.weight")
    assert features is None or features.dimension == 0
    assert [one for one in plan.notes if "down.weight" in one]


class Attention(nn.Module):
    """Eight heads of queries, fewer of keys and values; the gradient of the keys is clamped."""

    def __init__(self, groups: int, clamped: bool) -> None:
        super().__init__()
        self.groups, self.clamped = groups, clamped
        self.q, self.out = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, groups * 6), nn.Linear(WIDTH, groups * 6)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, 6)).transpose(1, 2)
        k, v = (each(x).unflatten(-1, (-1, 6)).transpose(1, 2) for each in (self.k, self.v))
        if self.clamped:
            k = functions.Clamped.apply(k, 0.05)
        k, v = (one.repeat_interleave(8 // self.groups, 1) for one in (k, v))
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).flatten(-2))


def _attention(size: int, groups: int, clamped: bool) -> Plan:
    return run(lambda: Attention(groups, clamped), size)


@pytest.mark.parametrize(("size", "groups"), [(2, 1), (3, 4), (4, 2)])
def test_shared_heads_are_not_clamped_in_parts(ranks: Callable[[int], Pool], size: int, groups: int) -> None:
    plan = ranks(size).run(_attention, size, groups, True)[0]
    if groups > 1:
        without = ranks(size).run(_attention, size, groups, False)[0]
        shared = {one.name for one in without.partial_parameters}
        assert ("k.weight" in shared) == (size > groups), "this is about parts that ranks share"
        assert ("k.weight" in plan.parameters) == (size <= groups)


def test_a_plan_is_derived_without_side_effects() -> None:
    model = Parallel("clamped", "normalised")
    state = torch.get_rng_state()
    before = {name: one.clone() for name, one in model.named_parameters()}
    derive_plan(model, {"training": Example((torch.randn(BATCH, TIME, WIDTH),))}, 2)
    torch.randn(BATCH, TIME, WIDTH)
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters())
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)
    torch.set_rng_state(state)
