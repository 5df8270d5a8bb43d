"""What plans do not have in common, with one another and with models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from colrow import PlanError
from colrow.plan import Exit, ModuleOutput, Plan, Sharding
from tests.plan.samples import everything, gpt2

transformers = pytest.importorskip("transformers")


def model(**fields: int) -> nn.Module:
    settings = {"n_layer": 4, "n_embd": 48, "n_head": 6, **fields}
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))


def test_equal_plans() -> None:
    assert gpt2(2).diff(gpt2(2)) == ""
    assert everything().diff(everything()) == ""


def test_other_cuts() -> None:
    assert gpt2(3).diff(gpt2(3, [2, 3, 1])).splitlines() == [
        "axes",
        "  ~  vocab  50257 units cut 16753 16752 16752 -> 50257 units cut 16752 25129 8376",
        "  ~  heads  6 units cut 2 2 2 -> 6 units cut 2 3 1",
        "  ~  mlp    192 units cut 64 64 64 -> 192 units cut 64 96 32",
        "attributes",
        "  ~  transformer.h.*.attn.split_size x 4  16 16 16 -> 16 24 8",
    ]


def test_another_number_of_ranks() -> None:
    assert gpt2(2).diff(gpt2(3)).splitlines()[:2] == ["ranks", "  ~ 2 -> 3"]


def test_parameters_and_actions_of_repeated_layers_are_together() -> None:
    plan = gpt2(2)
    gone = {name: one for name, one in plan.parameters.items() if "c_fc" not in name}
    turned = {
        name: Sharding(one.axis, 1, one.layout) if name.endswith("mlp.c_proj.weight") else one
        for name, one in gone.items()
    }
    exits = (*plan.exits[1:], Exit(ModuleOutput("transformer.ln_f")))
    other = dataclasses.replace(plan, parameters=turned, exits=exits)
    assert plan.diff(other).splitlines() == [
        "parameters",
        "  -  transformer.h.*.mlp.c_fc.weight x 4    mlp[1] (1, 192, 1)",
        "  -  transformer.h.*.mlp.c_fc.bias x 4      mlp[0] (1, 192, 1)",
        "  ~  transformer.h.*.mlp.c_proj.weight x 4  mlp[0] (1, 192, 1) -> mlp[1] (1, 192, 1)",
        "exits",
        "  -  output of transformer.h.0.attn.c_proj",
        "  +  output of transformer.ln_f",
    ]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Plan)])
def test_a_difference_in_any_field_is_seen(field: str) -> None:
    plan = everything()
    value = getattr(plan, field)
    other = dataclasses.replace(
        plan, **{field: 7 if field == "ranks" else type(value)() if isinstance(value, tuple | dict) else None}
    )
    assert plan.diff(other) != ""
    assert other.diff(plan) != ""


def test_another_order() -> None:
    plan = gpt2(2)
    assert plan.diff(dataclasses.replace(plan, exits=plan.exits[::-1])) == "the order of actions differs"


def test_the_model_that_a_plan_was_made_for() -> None:
    gpt2(2).check_model(model())
    Plan(2).check_model(nn.Linear(3, 4))


def test_a_wider_model_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        gpt2(2).check_model(model(n_inner=100))
    assert str(caught.value).splitlines() == [
        "(the model itself): the plan was made for another model, 12 parameters or buffers differ:",
        "  transformer.h.*.mlp.c_fc.weight differs (48 x 192 in the plan, 48 x 100 in the model) x 4",
        "  transformer.h.*.mlp.c_fc.bias differs (192 in the plan, 100 in the model) x 4",
        "  transformer.h.*.mlp.c_proj.weight differs (192 x 48 in the plan, 100 x 48 in the model) x 4. "
        "Derive a plan for this model, or build the model that the plan was made for.",
    ]


def test_layers_that_are_missing_or_new_are_named() -> None:
    with pytest.raises(PlanError, match=r"the model has no transformer.h.3.ln_1.weight \(48\)\n"):
        gpt2(2).check_model(model(n_layer=3))
    with pytest.raises(PlanError, match=r"the plan does not know transformer.h.\*.ln_1.weight \(48\) x 2\n"):
        gpt2(2).check_model(model(n_layer=6))


def test_buffers_are_compared_if_the_plan_knows_any() -> None:
    layer = nn.BatchNorm1d(4)
    shapes = {name: tuple(one.shape) for name, one in layer.named_parameters()}
    Plan(2, shapes=shapes).check_model(layer)
    buffers = {name: tuple(one.shape) for name, one in layer.named_buffers()}
    Plan(2, shapes=shapes | buffers).check_model(layer)
    with pytest.raises(PlanError, match="running_mean differs"):
        Plan(2, shapes=shapes | buffers | {"running_mean": (5,)}).check_model(layer)
    del buffers["running_var"]
    with pytest.raises(PlanError, match="the plan does not know running_var"):
        Plan(2, shapes=shapes | buffers).check_model(layer)
