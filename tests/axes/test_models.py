"""The axes of whole models: what is found must be what a person would say."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from colrow.axes import Axes, Axis, infer
from colrow.trace import trace

transformers = pytest.importorskip("transformers")

SHAPE = (3, 11)


def causal(name: str, **fields: Any) -> nn.Module:
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(
            vocab_size=101, bos_token_id=1, eos_token_id=2, **fields
        )
        return transformers.AutoModelForCausalLM.from_config(config)


def llama() -> nn.Module:
    return causal(
        "Llama",
        hidden_size=48,
        intermediate_size=91,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
    )


def gpt2() -> nn.Module:
    return causal("GPT2", n_embd=48, n_layer=2, n_head=6, n_positions=64)


def bert() -> nn.Module:
    fields = {"hidden_size": 48, "intermediate_size": 91, "num_hidden_layers": 2, "num_attention_heads": 6}
    with torch.device("meta"):
        config = transformers.BertConfig(vocab_size=101, max_position_embeddings=64, **fields)
        return transformers.BertForMaskedLM(config)


@cache
def axes_of(build: Callable[[], nn.Module], labels: bool = True) -> Axes:
    ids = torch.randint(3, 100, SHAPE)
    inputs = {"input_ids": ids, "labels": ids.clone()} if labels else {"input_ids": ids}
    return infer(trace(build().eval(), (), inputs))


def text(axes: Axes, name: str) -> list[str]:
    """What the dimensions of a parameter are made of."""
    value = next(value for value in axes.trace.values if value.source.name == name)
    return [axes.factors.text(factor) for factor in axes.dimensions(value)]


def axis_of(axes: Axes, name: str, dimension: int, size: int) -> Axis:
    """The axis of so many units in a dimension of a parameter."""
    (found,) = (each for each in axes.all if (name, dimension) in each.parameters and each.size == size)
    return found


def names(axis: Axis) -> set[str]:
    return {f"{name.removesuffix('.weight')}[{dimension}]" for name, dimension in axis.parameters}


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_every_operator_has_a_rule(build: Callable[[], nn.Module]) -> None:
    assert axes_of(build).unknown == {}


def test_llama_heads() -> None:
    """Query heads are key-value heads times repeats; the rotation halves queries and keys."""
    axes, block = axes_of(llama), "model.layers.1.self_attn"
    assert text(axes, f"{block}.q_proj.weight") == ["2*3*(5 + 5)", "48"]
    assert text(axes, f"{block}.k_proj.weight") == ["2*(5 + 5)", "48"]
    assert text(axes, f"{block}.o_proj.weight") == ["48", "2*3*10"]
    groups = axis_of(axes, f"{block}.q_proj.weight", 0, 2)
    assert groups.legal
    assert names(groups) == {
        f"{block}.{name}" for name in ("q_proj[0]", "k_proj[0]", "v_proj[0]", "o_proj[1]")
    }
    repeats = axis_of(axes, f"{block}.q_proj.weight", 0, 3)
    assert repeats.legal
    assert names(repeats) == {f"{block}.q_proj[0]", f"{block}.o_proj[1]"}


def test_llama_hidden_features_of_the_mlp() -> None:
    axis = axis_of(axes_of(llama), "model.layers.0.mlp.up_proj.weight", 0, 91)
    assert axis.legal
    assert names(axis) == {
        f"model.layers.0.mlp.{name}" for name in ("gate_proj[0]", "up_proj[0]", "down_proj[1]")
    }
    assert [operation.name for operation in axis.contractions] == ["aten.mm"]


def test_partial_attention_scores_are_illegal() -> None:
    axis = axis_of(axes_of(llama), "model.layers.0.self_attn.k_proj.weight", 0, 5)
    assert "attention scores" in str(axis.illegal[0])
    assert "self_attn" in str(axis.illegal[0])


@pytest.mark.parametrize(("build", "name"), [(llama, "model.norm.weight"), (gpt2, "transformer.ln_f.weight")])
def test_the_residual_stream_is_illegal_because_of_norms(build: Callable[[], nn.Module], name: str) -> None:
    axis = axis_of(axes_of(build), name, 0, 48)
    assert not axis.legal
    assert axis.illegal[0].operation is not None
    assert axis.illegal[0].operation.name in ("aten.mean", "aten.native_layer_norm")
    assert ".py:" in str(axis.illegal[0])


def test_vocabulary_goes_through_the_loss() -> None:
    axes = axes_of(llama)
    head, table = axis_of(axes, "lm_head.weight", 0, 101), axis_of(axes, "model.embed_tokens.weight", 0, 101)
    assert head.legal
    assert {operation.name for operation in head.losses} == {"aten._log_softmax", "aten.nll_loss_forward"}
    assert table.legal
    assert [operation.name for operation in table.lookups] == ["aten.embedding"]


def test_tied_vocabulary_is_one_axis() -> None:
    axis = axis_of(axes_of(gpt2), "transformer.wte.weight", 0, 101)
    assert axis.legal
    assert axis.lookups
    assert axis.losses


def test_vocabulary_without_labels_is_an_output() -> None:
    axis = axis_of(axes_of(llama, labels=False), "lm_head.weight", 0, 101)
    assert axis.legal
    assert not axis.losses


def test_gpt2_fused_projection_is_a_sum_of_alike_parts() -> None:
    axes, block = axes_of(gpt2), "transformer.h.0.attn"
    assert text(axes, f"{block}.c_attn.weight") == ["48", "(6*8 + 6*8 + 6*8)"]
    heads = axis_of(axes, f"{block}.c_attn.weight", 1, 6)
    assert heads.legal
    assert names(heads) == {f"{block}.c_attn[1]", f"{block}.c_attn.bias[0]", f"{block}.c_proj[0]"}


def test_bert_heads_with_biases() -> None:
    prefix = "bert.encoder.layer.1.attention"
    heads = axis_of(axes_of(bert), f"{prefix}.self.query.weight", 0, 6)
    assert heads.legal
    expected = {f"{prefix}.self.{name}[0]" for name in ("query", "key", "value")}
    expected |= {f"{prefix}.self.{name}.bias[0]" for name in ("query", "key", "value")}
    assert names(heads) == expected | {f"{prefix}.output.dense[1]"}


def without_labels(model: nn.Module) -> Axes:
    inputs = {"input_ids": torch.randint(3, 100, SHAPE)}
    return infer(trace(model.eval(), (), inputs, routing="guess"))


def test_query_key_and_value_within_each_head() -> None:
    """``heads x (q + k + v)``, of which the rotation takes a part."""
    fields = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 1, "intermediate_size": 96}
    axes = without_labels(causal("GPTNeoX", **fields))
    fused = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert text(axes, fused) == ["6*(1 + 1 + 6 + 1 + 1 + 6 + 8)", "48"]
    legal = {axis.size for axis in axes.all if axis.legal and (fused, 0) in axis.parameters}
    assert legal == {6, 8}, "heads, and the features of the values"


def test_groups_of_queries_with_their_key_and_value() -> None:
    """``groups x (queries + 1 + 1) x features``."""
    fields = {"hidden_size": 64, "num_attention_heads": 8, "num_kv_heads": 2, "num_hidden_layers": 1}
    axes = without_labels(causal("Falcon", new_decoder_architecture=True, alibi=False, bias=False, **fields))
    block = "transformer.h.0.self_attention"
    assert text(axes, f"{block}.query_key_value.weight") == ["2*(4 + 1 + 1)*(4 + 4)", "64"]
    groups = axis_of(axes, f"{block}.query_key_value.weight", 0, 2)
    assert groups.legal
    assert names(groups) == {f"{block}.query_key_value[0]", f"{block}.dense[1]"}


def test_stacked_experts_can_be_cut_along_and_inside() -> None:
    fields = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 33, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
    axes = without_labels(causal("Qwen3Moe", hidden_size=48, **heads, **fields))
    block = "model.layers.0.mlp.experts"
    assert text(axes, f"{block}.gate_up_proj") == ["5", "(33 + 33)", "48"]
    for size, dimensions in ((5, (0, 0)), (33, (1, 2))):
        axis = axis_of(axes, f"{block}.gate_up_proj", dimensions[0], size)
        assert axis.legal
        members = {
            f"{block}.{n}[{d}]" for n, d in zip(("gate_up_proj", "down_proj"), dimensions, strict=True)
        }
        assert names(axis) == members


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_the_sequence_is_illegal_and_in_one_piece(build: Callable[[], nn.Module]) -> None:
    axes = axes_of(build)
    (ids,) = (value for value in axes.trace.values if value.source.name == "input_ids")
    sequence = [axes.axis(atom) for atom in axes.atoms_of(axes.dimensions(ids)[1])]
    assert sum(axis.size for axis in sequence) >= SHAPE[1] - 2
    assert not any(axis.legal for axis in sequence)


def test_the_table_names_every_kind_of_axis_once() -> None:
    lines = str(axes_of(llama)).splitlines()
    assert lines[0].split()[:3] == ["axis", "units", "count"]
    (mlp,) = (line for line in lines if "mlp.down_proj.weight[1]" in line)
    assert mlp.split()[1:4] == ["91", "2", "contracted"]
    assert mlp.endswith("yes")


class KnownRows(nn.Module):
    """Attention over the rows that a mask of known content keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 24)
        self.projections = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = (ids != 0).flatten().nonzero()[:, 0]
        hidden = self.embedding(ids.flatten()[rows])
        q, k, v = (one(hidden).unflatten(-1, (3, 8)).transpose(0, 1) for one in self.projections)
        mixed: torch.Tensor = (q @ k.mT).softmax(-1) @ v
        return mixed


def test_rows_that_known_content_keeps_are_counted_as_data() -> None:
    axes = infer(trace(KnownRows(), (torch.arange(8).view(2, 4),)))
    inner = axis_of(axes, "projections.1.weight", 0, 8)
    assert "its partial sums would be attention scores" in [reason.text for reason in inner.illegal]
