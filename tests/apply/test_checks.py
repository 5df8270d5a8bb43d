"""Plans that would compute something else than the model are refused before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import colrow
from colrow.layout import Cut, DimensionLayout, Segment
from colrow.plan import (
    LLAMA,
    Axis,
    AxisSpec,
    Entry,
    Exit,
    HandPlan,
    LocalAttribute,
    Lookup,
    ModuleInput,
    ModuleOutput,
    PartialParameter,
    Plan,
    Sharding,
    column,
    replicated,
    row,
)
from tests.apply.comparison import assemble, largest_error
from tests.pool import Pool, worker_mesh


def _llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def _refused_and_unchanged() -> None:
    mesh = worker_mesh(2)
    plan = LLAMA.resolve(_llama(False), 2)
    embed = "model.embed_tokens.weight"
    tied = LLAMA.resolve(_llama(True), 2)
    without_embedding = {name: style for name, style in LLAMA.styles.items() if "embed" not in name}
    without_head = {name: style for name, style in LLAMA.styles.items() if name != "lm_head"}
    cases: list[tuple[Any, bool, str]] = [
        # a tied weight of which only one user would know that it is cut
        (
            replace(LLAMA, styles=without_embedding),
            True,
            r"embed_tokens\.weight: it is cut \(tied to lm_head",
        ),
        (replace(LLAMA, styles=without_head, loss=None), True, "lm_head would read it as if it were whole"),
        (replace(tied, lookups=()), True, "embed_tokens would read it"),
        (
            replace(plan, parameters=plan.parameters | {"model.norm.scale": plan.parameters[embed]}),
            False,
            "no such",
        ),
        (
            replace(plan, exits=(*plan.exits, Exit(ModuleOutput("model.norm")))),
            False,
            "LlamaRMSNorm is not a plain linear",
        ),
        (replace(plan, exits=(*plan.exits, Exit(ModuleOutput("model.nowhere")))), False, "no such module"),
        (
            replace(plan, lookups=(Lookup(ModuleOutput("model.norm"), "vocab"),)),
            False,
            "model.embed_tokens would read it",
        ),
        (
            replace(plan, partial_parameters=(PartialParameter(embed, "model.embed_tokens"),)),
            False,
            "not a replicated or shared parameter",
        ),
        (replace(plan, axes={}), False, "the plan has no axis"),
        (
            replace(plan, attributes=(LocalAttribute("", "config.num_attention_heads", (2, 2)),)),
            False,
            "saved",
        ),
        (
            replace(plan, attributes=(LocalAttribute("lm_head", "heads", (2, 2)),)),
            False,
            "no attribute heads",
        ),
    ]
    for bad, is_tied, message in cases:
        model = _llama(is_tied)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        types = [type(module) for module in model.modules()]
        with pytest.raises(colrow.PlanError, match=message):
            colrow.parallelize(model, mesh, bad)
        assert [type(module) for module in model.modules()] == types
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        colrow.parallelize(model, mesh, LLAMA)


def test_refused_before_anything_changes(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_refused_and_unchanged)


def test_axes_that_nothing_is_cut_along() -> None:
    model = _llama(False)
    for plan, message in [
        (
            replace(LLAMA, axes=LLAMA.axes | {"x": AxisSpec()}, attributes={"lm_head.in_features": "x"}),
            "no layer is cut",
        ),
        (replace(LLAMA, attributes={"lm_head.in_features": "y"}), "there is no axis 'y'"),
        (
            replace(LLAMA, styles=LLAMA.styles | {"model.norm": replicated(inside="y")}),
            "there is no axis 'y'",
        ),
        (replace(LLAMA, styles=LLAMA.styles | {"lm_head": column("words")}), "the axis 'words' is not among"),
        # a second layer along the vocabulary, whose output nobody gathers
        (
            replace(LLAMA, styles=LLAMA.styles | {"model.layers.0.mlp.up_proj": column("vocab")}),
            "no row-parallel",
        ),
    ]:
        with pytest.raises(colrow.PlanError, match=message):
            plan.resolve(model, 2)


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale, self.down = nn.Linear(4, 7), Factor(), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.tanh(self.scale(self.up(x))))
        return result


def _inside(size: int) -> None:
    """The axis needs a unit on every rank and takes its number of units from the layer."""
    plan = HandPlan(
        axes={"hidden": AxisSpec(every_rank=True)},
        styles={"scale": replicated(inside="hidden"), "up": column("hidden"), "down": row("hidden")},
    )
    torch.manual_seed(0)
    original = Hidden().double()
    torch.manual_seed(0)
    model = colrow.parallelize(Hidden().double(), worker_mesh(size), plan)
    assert list(colrow.state_of(model).plan.axes) == ["hidden"]
    x = torch.randn(3, 4, dtype=torch.float64)
    weights = torch.randn(3, 4, dtype=torch.float64)
    for one in (original, model):
        (one(x) * weights).sum().backward()
    gradients = assemble(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, parameter in original.named_parameters():
        assert parameter.grad is not None
        assert largest_error(gradients[name], parameter.grad) < 1e-12


@pytest.mark.parametrize("size", [2, 3])
def test_parameters_inside_an_axis_without_units(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_inside, size)


def test_plan_is_plain_data() -> None:
    plan = Plan(
        2,
        {"h": Axis("h", Cut.balanced(7, 2))},
        {"up.weight": Sharding("h", 0, DimensionLayout.contiguous(7))},
        entries=(Entry((ModuleInput("up", (0,)),)),),
        exits=(Exit(ModuleOutput("down")),),
    )
    assert plan == eval(repr(plan), {**globals(), "Segment": Segment})
    assert plan.tensor_layout("up.weight", (7, 4)).local_shape(0) == (4, 4)
    assert "entry: all-reduce backward" in plan.explain()
