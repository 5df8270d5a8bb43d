"""Traces of transformers' models: every mode, copies equal to what would have run."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from colrow.trace import Example, Trace, TraceError, trace, trace_all
from colrow.trace.integers import Attribute, TracedInt, evaluate
from colrow.trace.records import Operation
from colrow.trace.tree import map_leaves
from tests.trace.compare import assert_same
from tests.trace.models import ids

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 40,
}


def build(name: str, **more: Any) -> nn.Module:
    """A model on the meta device."""
    match name:
        case "llama":
            configuration = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **more)
            kind = transformers.LlamaForCausalLM
        case "gpt2":
            configuration = transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=40, **more)
            kind = transformers.GPT2LMHeadModel
        case "bert":
            configuration = transformers.BertConfig(**SIZES, **more)
            kind = transformers.BertForMaskedLM
        case "t5":
            configuration = transformers.T5Config(
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=4,
                num_heads=4,
                vocab_size=40,
                decoder_start_token_id=0,
                **more,
            )
            kind = transformers.T5ForConditionalGeneration
        case "mixtral":
            configuration = transformers.MixtralConfig(
                **SIZES, num_key_value_heads=2, num_local_experts=4, **more
            )
            kind = transformers.MixtralForCausalLM
        case _:
            configuration = transformers.DeepseekV3Config(
                **SIZES,
                num_key_value_heads=4,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
                n_routed_experts=8,
                num_experts_per_tok=2,
                n_group=4,
                topk_group=2,
                moe_intermediate_size=16,
                first_k_dense_replace=1,
                **more,
            )
            kind = transformers.DeepseekV3ForCausalLM
    with torch.device("meta"):
        return kind(configuration)


def copied_layers(record: Trace) -> int:
    """How many members of lists of layers were copied."""
    return sum(
        call.copy_of is not None
        and call.path.rpartition(".")[2].isdigit()
        and "block.0.layer" not in call.path
        for call in record.modules
    )


def names(record: Trace) -> set[str]:
    return {operation.name for operation in record.operations}


def check_integers(record: Trace) -> None:
    def check(leaf: Any) -> Any:
        if isinstance(leaf, TracedInt):
            assert evaluate(leaf.expression, lambda origin: origin.value) == leaf
        return leaf

    for call in record.calls:
        map_leaves((call.arguments, call.keywords), check)


@pytest.mark.parametrize(
    ("name", "copied"),
    [("llama", 3), ("gpt2", 3), ("bert", 3), ("t5", 14), ("mixtral", 3), ("deepseek", 2)],
)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_copied_layers_equal_layers_that_ran(name: str, copied: int, mode: str) -> None:
    model = build(name)
    keywords: dict[str, Any] = {"input_ids": ids(), "use_cache": False}
    if mode == "training":
        keywords["labels"] = ids()
    elif name == "t5":
        keywords["decoder_input_ids"] = ids(length=5)
    if name == "bert":
        del keywords["use_cache"]
        keywords["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    record = trace(model, (), keywords, mode=mode)
    assert not record.warnings
    assert copied_layers(record) == copied
    assert_same(record, trace(model, (), keywords, mode=mode, copy_layers=False))
    check_integers(record)
    assert ("aten.nll_loss_forward" in names(record)) == (mode == "training")
    assert record.outputs[0][0] == (("loss",) if mode == "training" else ("logits",))
    last = max(value.producer.index for _, value in record.outputs if value.producer is not None)
    assert last > len(record.operations) - 20
    parameters = {value.source.name: value for value in record.values if value.source.kind == "parameter"}
    assert parameters.keys() == dict(model.named_parameters()).keys()
    reached = [value for value in parameters.values() if value.uses]
    assert len(reached) >= len(parameters) - 2
    assert all(value.differentiable for value in reached)


def test_generation_with_a_cache() -> None:
    model = build("llama")
    first = {"input_ids": ids(), "use_cache": True}
    with torch.no_grad():
        cache = model(input_ids=ids().to("meta"), use_cache=True).past_key_values
    later = {"input_ids": ids(length=1), "past_key_values": cache, "use_cache": True}
    records = trace_all(model, {"generation": Example((), first), "later generation": Example((), later)})
    for record in records.values():
        assert len(record.outputs) == 1 + 2 * 4
        assert copied_layers(record) == 0
        check_integers(record)
    keys = next(value for path, value in records["later generation"].outputs if path[-1] == "keys")
    assert keys.shape == (2, 2, 8, 8)
    inputs = [v.source.name for v in records["later generation"].values if v.source.kind == "input"]
    assert inputs[:3] == ["input_ids", "past_key_values.layers.0.keys", "past_key_values.layers.0.values"]
    # the example itself is as it was
    assert cache.get_seq_length() == 7
    embedded = next(o for o in records["later generation"].operations if o.name == "aten.embedding")
    assert embedded.outputs[0].shape == (2, 1, 32)


def test_cross_attention_reads_the_encoder() -> None:
    keywords = {"input_ids": ids(), "decoder_input_ids": ids(length=5), "use_cache": False}
    record = trace(build("t5"), (), keywords)
    encoder = next(call for call in record.modules if call.path == "encoder").outputs[0][1]
    attention = next(call for call in record.modules if call.type_name == "T5LayerCrossAttention")
    assert (("key_value_states",), encoder) in attention.inputs
    readers = {use.module.path for use in encoder.uses if use.module is not None}
    assert {f"decoder.block.{layer}.layer.1.EncDecAttention.k" for layer in range(4)} <= readers


def test_attributes_of_a_shared_configuration_have_one_name() -> None:
    record = trace(build("deepseek"), (), {"input_ids": ids(), "use_cache": False})
    found: set[Attribute] = set()

    def collect(leaf: Any) -> Any:
        if isinstance(leaf, TracedInt) and isinstance(leaf.expression, Attribute):
            found.add(leaf.expression)
        return leaf

    for call in record.calls:
        map_leaves((call.arguments, call.keywords), collect)
    modules = {attribute.module for attribute in found}
    assert {f"model.layers.{layer}.self_attn" for layer in range(4)} <= modules
    assert all(attribute.path.startswith("config.") for attribute in found if attribute.module == "")


def test_a_loop_over_chosen_experts_is_an_error_or_a_guess() -> None:
    model = build("mixtral", experts_implementation="eager")
    keywords = {"input_ids": ids(), "use_cache": False}
    with pytest.raises(
        TraceError, match=r"modeling_mixtral.py:\d+ in forward, in model.layers.0.mlp.experts"
    ):
        trace(model, (), keywords)
    record = trace(model, (), keywords, routing="guess")
    assert record.warnings
    assert_same(record, trace(model, (), keywords, routing="guess", copy_layers=False))
    experts = next(call for call in record.modules if call.path == "model.layers.2.mlp.experts")
    operations: list[Operation] = record.operations[experts.first : experts.last]
    assert sum(operation.name == "aten.index_add_" for operation in operations) == 4


def test_results_collected_by_hooks_are_those_of_all_layers() -> None:
    model = build("mixtral")
    keywords = {
        "input_ids": ids(),
        "use_cache": False,
        "labels": ids(),
        "output_router_logits": True,
        "output_hidden_states": True,
    }
    record = trace(model, (), keywords, mode="training")
    assert_same(record, trace(model, (), keywords, mode="training", copy_layers=False))
    paths = [path for path, _ in record.outputs]
    assert [path for path in paths if path[0] == "router_logits"] == [("router_logits", n) for n in range(4)]
    assert [path for path in paths if path[0] == "hidden_states"] == [("hidden_states", n) for n in range(5)]


def test_one_layer_of_many_runs() -> None:
    record = trace(build("llama"), (), {"input_ids": ids(), "use_cache": False})
    layers = [call for call in record.modules if call.type_name == "LlamaDecoderLayer"]
    assert [call.copy_of is None for call in layers] == [True, False, False, False]
    assert all(call.copy_of is layers[0] for call in layers[1:])


@pytest.mark.slow
def test_405_billion_parameters_take_seconds() -> None:
    configuration = transformers.LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(configuration)
    start = time.process_time()
    record = trace(model, (), {"input_ids": ids(), "use_cache": False})
    assert time.process_time() - start < 10
    assert copied_layers(record) == 125
