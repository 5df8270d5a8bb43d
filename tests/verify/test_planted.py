"""Every kind of planted error is found, and named: the module, the call and the direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from colrow.plan import BERT, GPT2, LLAMA, HandPlan, Plan, column
from colrow.plan.derive import derive_plan
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.pool import Pool, worker_mesh
from tests.verify import models
from tests.verify.planted import changed_reduction


def _reduction(size: int, build: Callable[[], nn.Module], plan: HandPlan, label: str, add: float) -> Report:
    """A reduction left out, or with something added on every rank."""

    def added(tensor: Tensor) -> Tensor:
        return tensor + add * torch.linspace(1, 2, tensor.shape[-1])

    with changed_reduction(label, added if add else None) as met:
        report = verify_on_ranks(build, models.tokens(), worker_mesh(size), plan, steps=1)
    assert met
    return report


def _planned(size: int, build: Callable[[], nn.Module], plan: HandPlan | Plan) -> Report:
    return verify_on_ranks(build, models.tokens(), worker_mesh(size), plan, steps=1)


def _without_reduction_of(build: Callable[[], nn.Module], size: int, name: str) -> Plan:
    plan = LLAMA.resolve(build(), size)
    kept = tuple(one for one in plan.partial_parameters if one.name != name)
    assert len(kept) == len(plan.partial_parameters) - 1
    return replace(plan, partial_parameters=kept)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("build", "plan", "region", "layers"),
    [
        (models.llama, LLAMA, "model.layers.1.mlp", ("gate_proj", "up_proj")),
        (models.llama, LLAMA, "model.layers.0.self_attn", ("q_proj", "k_proj", "v_proj")),
        pytest.param(models.gpt2, GPT2, "transformer.h.0.mlp", ("c_fc",), marks=pytest.mark.slow),
        (models.bert, BERT, "bert.encoder.layer.1.attention.self", ("query", "key", "value")),
    ],
)
def test_an_entry_dropped(
    ranks: Callable[[int], Pool],
    size: int,
    build: Callable[[], nn.Module],
    plan: HandPlan,
    region: str,
    layers: tuple[str, ...],
) -> None:
    for report in ranks(size).run(_reduction, size, build, plan, f"enter {region}.", 0.0):
        assert not report.passed
        assert all(
            check.passed for check in report.checks if check.kind == "outputs" and "step" not in check.stage
        )
        difference = report.difference
        assert difference is not None
        assert difference.direction == "backward"
        assert difference.module in [f"{region}.{layer}" for layer in layers]
        assert "the gradient of" in difference.detail
        assert str(difference).startswith(f"first difference: backward, module {difference.module} (")


@pytest.mark.parametrize("size", [2, 3])
def test_a_bias_added_twice(ranks: Callable[[int], Pool], size: int) -> None:
    where = "exit transformer.h.1.attn.c_proj"
    for report in ranks(size).run(_reduction, size, models.gpt2, GPT2, where, 0.5):
        difference = report.difference
        assert difference is not None
        assert difference.direction == "forward"
        assert (difference.module, difference.module_type) == ("transformer.h.1.attn.c_proj", "Conv1D")
        assert difference.place.startswith("modeling_gpt2.py:")
        assert "c_proj" in difference.text
        assert difference.error > 0.01


@pytest.mark.parametrize("size", [2, 3])
def test_an_exit_dropped(ranks: Callable[[int], Pool], size: int) -> None:
    where = "exit model.layers.0.mlp.down_proj"
    difference = ranks(size).run(_reduction, size, models.llama, LLAMA, where, 0.0)[0].difference
    assert (difference.direction, difference.module) == ("forward", "model.layers.0.mlp.down_proj")
    assert "pending where add at modeling_llama.py" in difference.detail


@pytest.mark.parametrize("size", [2, 3])
def test_a_wrong_packed_layout(ranks: Callable[[int], Pool], size: int) -> None:
    wrong = replace(GPT2, styles=GPT2.styles | {"**.attn.c_attn": column("heads")})
    for report in ranks(size).run(_planned, size, models.gpt2, wrong):
        difference = report.difference
        assert difference is not None
        assert (difference.direction, difference.module) == ("forward", "transformer.h.0.attn")
        assert (difference.module_type, difference.call) == ("GPT2Attention", "split")
        assert "self.c_attn(hidden_states).split(" in difference.text
        assert "c_attn" in difference.detail


@pytest.mark.parametrize("size", [2, 3])
def test_a_reduction_of_a_parameters_gradient_missing(ranks: Callable[[int], Pool], size: int) -> None:
    name = "model.layers.1.self_attn.q_norm.weight"
    plan = _without_reduction_of(models.qwen3, size, name)
    for report in ranks(size).run(_planned, size, models.qwen3, plan):
        # what else differs follows from the step
        assert {check.name for check in report.failed if check.stage == "training"} == {name}
        assert any(check.kind == "replicas" for check in report.failed)
        difference = report.difference
        assert difference is not None
        assert (difference.direction, difference.module) == ("backward", "model.layers.1.self_attn.q_norm")
        assert name in difference.detail
        assert "a reduction is missing" in difference.detail


def _raising(size: int) -> Report:
    def checked(tensor: Tensor) -> Tensor:
        raise ValueError("this projection does not like its input")

    with changed_reduction("exit model.layers.1.self_attn.o_proj", checked):
        return verify_on_ranks(models.llama, models.tokens(), worker_mesh(size), LLAMA, steps=1)


def test_an_error_that_only_the_parallelized_model_raises(ranks: Callable[[int], Pool]) -> None:
    for report in ranks(2).run(_raising, 2):
        assert [check.name for check in report.failed] == ["the parallelized model raised"]
        difference = report.difference
        assert difference is not None
        assert (difference.direction, difference.module) == ("forward", "model.layers.1.self_attn.o_proj")
        assert "ValueError: this projection does not like its input" in difference.detail
        assert difference.place.startswith("test_planted.py:")
        assert "DIFFERENT" in str(report)


def _derived(size: int, kind: str, index: int) -> Report:
    """The derived plan, without one of its actions."""
    x = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    plan = derive_plan(models.Bricks(), {"training": Example((x,))}, size)
    if kind:
        actions = list(getattr(plan, kind))
        del actions[index]
        plan = replace(plan, **{kind: tuple(actions)}, prediction=None)
    return verify_on_ranks(models.Bricks, Example((x,)), worker_mesh(size), plan, steps=1)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("kind", "index", "direction", "module", "detail"),
    [
        ("entries", 1, "backward", "bricks.1", "a sum over the ranks that is pending"),
        ("exits", 1, "forward", "bricks.1", "pending where add at models.py"),
        ("gathers", 0, "forward", "", "instead of [4, 7, 3]"),
        ("partial_parameters", 1, "backward", "bricks.1", "the parameter bricks.1.scale"),
        ("once_parameters", 1, "forward", "bricks.1", "computed from"),
    ],
)
def test_an_action_of_a_derived_plan_dropped(
    ranks: Callable[[int], Pool], size: int, kind: str, index: int, direction: str, module: str, detail: str
) -> None:
    for report in ranks(size).run(_derived, size, kind, index):
        difference = report.difference
        assert difference is not None
        assert (difference.direction, difference.module) == (direction, module), str(difference)
        assert detail in difference.detail


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_derived_plan_is_equal(ranks: Callable[[int], Pool], size: int) -> None:
    for report in ranks(size).run(_derived, size, "", 0):
        assert report.passed, str(report)
        assert any(check.kind == "collectives" for check in report.checks) or size == 1
