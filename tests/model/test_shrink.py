"""Small versions of configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colrow.model import shrink
from colrow.model.classes import model_class, model_classes
from colrow.model.shrink import find_small

transformers = pytest.importorskip("transformers")


def small(name: str, **fields: Any) -> Any:
    return shrink(getattr(transformers, f"{name}Config")(**fields))


def test_llama_is_small_and_cut_unevenly() -> None:
    config = small("Llama", num_key_value_heads=8)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (48, 6, 2)
    assert (config.num_hidden_layers, config.head_dim, config.intermediate_size) == (2, 8, 100)
    assert config.vocab_size == 131


@pytest.mark.parametrize(
    ("name", "fields", "heads", "groups"),
    [
        ("Llama", {}, 6, 6),
        ("Mistral", {"num_key_value_heads": 4}, 6, 2),
        ("Gemma", {"num_key_value_heads": 1}, 6, 1),
        ("Qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 192}, 3, 1),
    ],
)
def test_heads_keep_their_groups(name: str, fields: dict[str, int], heads: int, groups: int) -> None:
    config = small(name, **fields)
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, groups)


def test_one_layer_of_each_kind() -> None:
    assert small("Gemma3Text").layer_types == ["sliding_attention", "full_attention"]
    config = small("DeepseekV3")
    assert (config.num_hidden_layers, config.first_k_dense_replace) == (2, 1), "one dense, one of experts"
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_group) == (6, 2, 2)
    config = small("Jamba")
    assert set(config.layers_block_type) == {"mamba", "attention"}
    config = small("Qwen3Next")
    assert config.layer_types == ["linear_attention", "full_attention"]


def test_layers_whose_results_are_read() -> None:
    config = small("Dinov2", out_indices=[3, 6, 9, 12])
    assert config.num_hidden_layers == 4
    assert list(config.out_indices) == [1, 2, 3, 4]


def test_nested_configurations_fit_together() -> None:
    config = small("Llava")
    assert config.text_config.hidden_size == 48
    assert config.vision_config.image_size == 4 * config.vision_config.patch_size
    assert config.image_token_index < config.text_config.vocab_size


def test_special_tokens_are_apart() -> None:
    config = small("Qwen2VL")
    tokens = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    assert len(set(tokens)) == 3
    assert max(tokens) < config.text_config.vocab_size


def test_small_configurations_stay_as_they_are() -> None:
    before = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=32, num_attention_heads=3, num_hidden_layers=2, vocab_size=64
    )
    data = before.to_dict()
    after = shrink(before)
    assert before.to_dict() == data
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    assert [getattr(after, name) for name in same] == [data[name] for name in same]


#: Text, vision, speech, state spaces, experts, convolutions; fields of many names.
CONFIGURATIONS = [
    "albert",
    "bart",
    "bloom",
    "clip",
    "ctrl",
    "electra",
    "falcon",
    "gptj",
    "gpt_neox",
    "mamba2",
]
CONFIGURATIONS += [
    "mixtral",
    "opt",
    "phi3",
    "swin",
    "wav2vec2",
    "convnext",
    "resnet",
    "siglip",
    "xlnet",
    "bit",
]


@pytest.mark.parametrize("model_type", CONFIGURATIONS)
def test_small_models_run(model_type: str) -> None:
    found = find_small(transformers.AutoConfig.for_model(model_type))
    assert found.recipe is not None, found.error
    assert found.parameters < 1_000_000
    with torch.device("meta"):
        model = found.model_class(found.config)
    assert sum(one.numel() for one in model.parameters()) == found.parameters


def test_a_model_that_cannot_be_built_is_told_with_the_cause() -> None:
    config = transformers.LlamaConfig(hidden_act="no such function")
    with pytest.raises(ValueError, match=r"LlamaConfig cannot be made small: .*no such function"):
        shrink(config)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (transformers.BertConfig(), "BertForMaskedLM"),
        (transformers.BertConfig(is_decoder=True), "BertLMHeadModel"),
        (transformers.GPT2Config(), "GPT2LMHeadModel"),
        (transformers.BartConfig(), "BartForConditionalGeneration"),
        (transformers.WhisperConfig(), "WhisperForConditionalGeneration"),
        (transformers.CLIPVisionConfig(), "CLIPVisionModel"),
        (transformers.Llama4Config(), "Llama4ForConditionalGeneration"),
        (transformers.BertConfig(architectures=["BertForTokenClassification"]), "BertForTokenClassification"),
    ],
)
def test_the_class_of_a_configuration(config: Any, name: str) -> None:
    assert model_class(config).__name__ == name


def test_parts_of_models_are_no_models() -> None:
    with pytest.raises(ValueError, match="it describes a part of another model"):
        model_classes(transformers.SamMaskDecoderConfig())
