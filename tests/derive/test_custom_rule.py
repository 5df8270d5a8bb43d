"""A model with an operator of its own: cut only where that does not matter, and with a rule where it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import colrow
from colrow.axes import Registry, RuleContext, default_registry
from colrow.plan import Plan, derive_plan
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.axes.brute_force import Case, check_cuts, check_linear
from tests.axes.drawing import Draw
from tests.pool import Pool, worker_mesh


@torch.library.custom_op("colrow_tests::decay", mutates_args=())
def decay(value: Tensor, rate: Tensor) -> Tensor:
    """``y[t] = rate * y[t - 1] + value[t]``: value ``[batch, time, heads, size]``, rate ``[heads]``."""
    state, found = torch.zeros_like(value[:, 0]), []
    for step in value.unbind(1):
        state = rate[:, None] * state + step
        found.append(state)
    return torch.stack(found, 1)


@decay.register_fake
def _(value: Tensor, rate: Tensor) -> Tensor:
    return torch.empty_like(value)


@torch.library.custom_op("colrow_tests::decay_backward", mutates_args=())
def decay_backward(gradient: Tensor, result: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of value and rate."""
    flipped = decay(gradient.flip(1), rate).flip(1)
    return flipped, (flipped[:, 1:] * result[:, :-1]).sum((0, 1, 3))


@decay_backward.register_fake
def _(gradient: Tensor, result: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gradient), torch.empty_like(rate)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output, inputs[1])


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    return decay_backward(gradient, *ctx.saved_tensors)


decay.register_autograd(_backward, setup_context=_setup)


@colrow.rule("colrow_tests.decay", linear=["value"])
def decay_rule(op: RuleContext) -> None:
    """Heads and features are on their own, the steps of time are not."""
    batch, time, heads, size = op.dimensions("value")
    (rates,) = op.dimensions("rate")
    op.unify(heads, rates)
    op.block(time, "each step needs the one before")
    op.set_output([batch, time, heads, size])


class Memory(nn.Module):
    """Projects to heads, lets each decay at its own rate, projects back; then a feed-forward layer."""

    def __init__(self, width: int = 12, heads: int = 5, size: int = 3) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.inner = nn.Linear(width, heads * size)
        self.rate = nn.Parameter(torch.rand(heads))
        self.outer = nn.Linear(heads * size, width)
        self.up, self.down = nn.Linear(width, 30), nn.Linear(30, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inner(x).view(*x.shape[:-1], self.heads, self.size)
        x = x + self.outer(decay(heads, self.rate).flatten(-2))
        return x + self.down(torch.relu(self.up(x)))


def registry() -> Registry:
    return default_registry().extended(decay_rule)


def example(dtype: torch.dtype = torch.float32) -> Example:
    return Example((torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0), dtype=dtype),))


def _plan(rules: Registry | None) -> Plan:
    return derive_plan(Memory(), {"training": example()}, 2, registry=rules)


def test_without_a_rule_it_stays_whole_and_says_so() -> None:
    plan = _plan(None)
    assert set(plan.parameters) == {"up.weight", "up.bias", "down.weight"}
    assert "no rule for colrow_tests.decay (1 times): its dimensions stay whole" in plan.explain()


def test_with_the_rule_it_is_cut() -> None:
    plan = _plan(registry())
    assert {"inner.weight", "inner.bias", "rate", "outer.weight", "up.weight"} <= set(plan.parameters)
    assert plan.axes[plan.parameters["rate"].axis].cut.counts == (3, 2)
    assert "no rule" not in plan.explain()


def _verified(with_rule: bool) -> Report:
    rules = registry() if with_rule else None
    return verify_on_ranks(Memory, example(torch.float64), worker_mesh(2), registry=rules)


@pytest.mark.parametrize("with_rule", [False, True])
def test_exact(ranks: Callable[[int], Pool], with_rule: bool) -> None:
    report = ranks(2).run(_verified, with_rule, timeout=120)[0]
    report.raise_if_different()
    assert ("rate" in report.plan.parameters) == with_rule


def _parallelized() -> tuple[int, ...]:
    torch.manual_seed(0)
    model = Memory()
    colrow.parallelize(model, worker_mesh(2), example(), registry=registry())
    return tuple(model.rate.shape)


def test_parallelize_takes_the_registry(ranks: Callable[[int], Pool]) -> None:
    assert ranks(2).run(_parallelized) == [(3,), (2,)]


@settings(deadline=None, max_examples=10, database=None)
@given(data=st.data())
def test_the_rule_against_brute_force(data: st.DataObject) -> None:
    draw = Draw(data)
    batch, time, heads, size = (draw.size() for _ in range(4))
    function = torch.ops.colrow_tests.decay.default
    case = Case(function, [draw.tensor(batch, time, heads, size), draw.positive(heads)], free=3)
    check_cuts(case, draw.cut, registry())
    check_linear(case, registry())
