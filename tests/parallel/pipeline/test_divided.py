"""Schedules that divide backward passes leave gradients of weights for later, and do nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import colrow
from colrow.layers import linear_functions, siblings
from tests.parallel.pipeline.models import batch_of
from tests.parallel.pipeline.training import make
from tests.pool import Pool

MICRO_BATCHES = 4


def _work(schedule: str) -> tuple[list[bool], dict[str, tuple[int, int]]]:
    """Of a step's products for weights, whether each was computed in a backward pass; and what is reduced."""
    pipeline = make("gpt2", {"pp": 2, "tp": 2}, schedule=schedule, micro_batches=MICRO_BATCHES)
    batch = batch_of("gpt2", 0)
    pipeline.step(batch)
    in_backward: list[bool] = []

    def noted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def note(*arguments: Any) -> Tensor:
            in_backward.append(torch._C._current_graph_task_id() != -1)
            return function(*arguments)

        return note

    with pytest.MonkeyPatch.context() as patch:
        for module in (linear_functions, siblings):
            patch.setattr(module, "gradient_of_weight", noted(module.gradient_of_weight))
        colrow.reset_comm_stats()
        pipeline.step(batch)
    stats = colrow.comm_stats()
    tallies = {phase: stats.where(operation="all_reduce", phase=phase) for phase in ("forward", "backward")}
    return in_backward, {phase: (tally.count, tally.bytes) for phase, tally in tallies.items()}


def test_gradients_of_weights_are_computed_once_and_later(ranks: Callable[[int], Pool]) -> None:
    pool = ranks(4)
    undivided = pool.run(_work, "interleaved_1f1b")
    divided = pool.run(_work, "interleaved_zero_bubble")
    for (now, reduced), (later, reduced_too) in zip(undivided, divided, strict=True):
        assert now
        assert now == [True] * len(now)
        assert later == [False] * len(now)
        assert reduced_too == reduced


def _hooked() -> None:
    """Who waits for a weight's gradient is told of it in the backward pass."""
    pipeline = make("llama", {"pp": 2}, schedule="zbv", micro_batches=MICRO_BATCHES)
    heard: list[str] = []
    weights = [one for name, one in pipeline.model.named_parameters() if name.endswith("up_proj.weight")]
    weights[0].register_hook(lambda gradient: heard.append("hook"))
    weights[1].register_post_accumulate_grad_hook(lambda weight: heard.append("accumulated"))
    pipeline.step(batch_of("llama", 0))
    # the last stage has nothing to do for a micro-batch without labels
    assert heard.count("hook") == MICRO_BATCHES
    assert heard.count("accumulated") >= MICRO_BATCHES - 1


def test_hooks_of_weights_are_called(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_hooked)


def _autocast(schedule: str) -> tuple[list[Tensor], int]:
    """Gradients of a step under autocast, and how many products were left for later."""
    pipeline = make("llama", {"pp": 2}, schedule=schedule, micro_batches=MICRO_BATCHES)
    pipeline.model.float()
    left = 0
    add = colrow.layers.later.WeightGradients.add

    def counted(*arguments: Any) -> None:
        nonlocal left
        left += 1
        add(*arguments)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(colrow.layers.later.WeightGradients, "add", counted)
        pipeline.step(batch_of("llama", 0))
    return [one.grad for one in pipeline.model.parameters() if one.grad is not None], left


def test_autocast(ranks: Callable[[int], Pool]) -> None:
    """Weights that autocast casts get gradients of their own dtype, later too."""
    undivided = ranks(2).run(_autocast, "interleaved_1f1b")
    divided = ranks(2).run(_autocast, "interleaved_zero_bubble")
    for (expected, none), (found, left) in zip(undivided, divided, strict=True):
        assert none == 0
        assert left > 0
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.01 * float(other.abs().max()))


def _after_a_failure() -> None:
    """What a step that failed has left is forgotten by the next."""
    pipeline = make("llama", {"pp": 2}, schedule="zbv", micro_batches=MICRO_BATCHES)
    batch = batch_of("llama", 0)
    pipeline.step(batch)
    expected = [one.grad.clone() for one in pipeline.model.parameters() if one.grad is not None]
    assert pipeline._made is not None
    for stage in pipeline._made[1]._stages:
        weight = next(one for one in pipeline.model.parameters() if one.dim() == 2)
        stage.later.add(weight, lambda weight=weight: torch.ones_like(weight))
    pipeline.model.zero_grad()
    pipeline.step(batch)
    found = [one.grad for one in pipeline.model.parameters() if one.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_step_begins_anew(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_after_a_failure)
