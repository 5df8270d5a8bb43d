"""Where derived plans put collectives: the fewest, where they belong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from colrow.plan import CallResult, ModuleOutput, Plan, derive_plan
from colrow.trace import Example
from colrow.verify import verify_on_ranks
from tests.benchmarks.builders import load
from tests.pool import Pool, worker_mesh


def _plan(name: str, ranks: int = 2) -> Plan:
    model, inputs = load("listed").build(name)
    return derive_plan(model, {"evaluation": Example((), inputs)}, ranks)


def test_a_decoder_layer_has_two_entries_and_two_exits() -> None:
    plan = _plan("llama:labels")
    # at the layers that read the value, whose backward overlaps with the reduction
    assert [one.modules for one in plan.entries] == [
        *(
            tuple(f"model.layers.{layer}.{name}" for name in names)
            for layer in range(2)
            for names in (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("mlp.gate_proj", "mlp.up_proj"),
            )
        ),
        ("lm_head",),
    ]
    assert {one.place for one in plan.exits} == {
        ModuleOutput(f"model.layers.{layer}.{name}")
        for layer in range(2)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert not plan.integers
    assert not plan.attributes
    assert plan.loss is not None
    assert plan.loss.logits == "lm_head"


@pytest.mark.parametrize("name", ["gpt-neox", "falcon-one-group", "falcon-groups"])
def test_a_parallel_block_has_one_of_each(name: str) -> None:
    plan = _plan(name)
    assert len(plan.exits) == 2
    assert all(isinstance(one.place, CallResult) for one in plan.exits)
    assert len(plan.entries) == 2 + 1


@pytest.mark.parametrize("name", ["mixtral", "mixtral-loop", "qwen3-moe-loop", "deepseek-v3-loop"])
def test_experts_are_left_together(name: str) -> None:
    plan = _plan(name)
    layers = 3 if name.startswith("deepseek") else 2
    assert len(plan.exits) <= 2 * layers
    assert not any(".experts." in one.module for one in plan.exits)


class DenseExperts(nn.Module):
    """All experts see all tokens, and their weighted results are added up before the residual is."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 4)
        self.up, self.down = nn.Parameter(torch.rand(4, 12, 20)), nn.Parameter(torch.rand(4, 20, 12))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        results = torch.bmm(torch.bmm(x.expand(4, -1, -1), self.up).relu(), self.down)
        return x + (results * weights.t()[..., None]).sum(0)


def _dense_experts(size: int) -> Plan:
    torch.manual_seed(0)
    examples = {"training": Example((torch.randn(10, 12),))}
    report = verify_on_ranks(DenseExperts(), examples, worker_mesh(size))
    report.raise_if_different()
    return report.plan


def test_weighted_experts_are_reduced_when_they_have_been_added(ranks: Callable[[int], Pool]) -> None:
    plan = ranks(3).run(_dense_experts, 3)[0]
    assert plan.prediction is not None
    exits = [one for one in plan.prediction.collectives if one.label.startswith("exit")]
    assert [(one.shape, one.count) for one in exits] == [((10, 12), 1)]


def test_norms_of_heads_get_summed_gradients() -> None:
    names = {one.name for one in _plan("qwen3").partial_parameters}
    assert "model.layers.0.self_attn.q_norm.weight" in names
    assert "model.layers.1.self_attn.k_norm.weight" in names
    assert "model.layers.0.input_layernorm.weight" not in names


def test_shared_key_value_heads_are_cut_with_their_queries() -> None:
    plan = _plan("llama-two-groups", 4)
    key = plan.parameters["model.layers.0.self_attn.k_proj.weight"]
    cut = plan.axes[key.axis].cut
    assert [key.layout.local_size(cut, rank) for rank in range(4)] == [key.layout.size // 2] * 4
    assert {ranks for _, ranks in key.layout.shared(cut)} == {(0, 1), (2, 3)}
    shared = {one.name for one in plan.partial_parameters}
    assert "model.layers.0.self_attn.v_proj.weight" in shared


class Scaled(nn.Module):
    """Divides by the number of its features, as it is at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.up(x))
        result: Tensor = self.down(y / y.shape[-1] ** 0.5)
        return result


class Deciding(Scaled):
    """Does something else where there are few features."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if y.shape[-1] < 20:
            raise ValueError("too few")
        result: Tensor = self.down(torch.relu(y))
        return result


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Scaled, "computes with a size that would become local"), (Deciding, "would decide otherwise")],
)
def test_numbers_that_cannot_become_local_are_named(module: type[nn.Module], reason: str) -> None:
    plan = derive_plan(module(), {"evaluation": Example((torch.randn(3, 8),))}, 2)
    # the axis that would need it stays whole, and the notes say why and where
    notes = [note for note in plan.notes if reason in note]
    assert notes
    assert "test_placement.py:" in notes[0]
    assert all(sharding.layout.size != 24 for sharding in plan.parameters.values())


def test_forbidden_parameters_stay_whole() -> None:
    model, inputs = load("listed").build("gpt2")
    examples = {"evaluation": Example((), inputs)}
    plan = derive_plan(model, examples, 2, forbid=["transformer.h.0.mlp.c_fc.weight"])
    assert "transformer.h.1.mlp.c_fc.weight" not in plan.parameters  # layers are cut alike
    assert "transformer.h.1.attn.c_attn.weight" in plan.parameters
    assert any("forbidden by the caller" in note for note in plan.notes)
    with pytest.raises(ValueError, match="there is no such parameter or axis to forbid"):
        derive_plan(model, examples, 2, forbid=["transformer.nothing"])


def test_one_rank_cuts_nothing() -> None:
    plan = _plan("llama", 1)
    assert not plan.parameters
    assert not plan.entries
