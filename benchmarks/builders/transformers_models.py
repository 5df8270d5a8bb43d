"""Small transformers models by name: what the list of covered architectures asks for, and difficult variants.

Sizes are small and, where the architecture allows it, odd: no number of ranks divides all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

BATCH, SEQUENCE = 2, 10
VOCABULARY = 97
LABELS_IGNORED = -100

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 3}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "image_size": 16,
    "patch_size": 4,
}

Inputs = dict[str, Any]


def ids(length: int = SEQUENCE) -> Tensor:
    """Token ids [batch, length], none of them special."""
    return torch.randint(3, VOCABULARY, (BATCH, length))


def labels_of(given: Tensor) -> Tensor:
    """``given`` with some places that the loss ignores."""
    return given.masked_fill(torch.rand(given.shape) < 0.2, LABELS_IGNORED)


def padding(length: int = SEQUENCE, left: bool = False) -> Tensor:
    """A mask [batch, length] that hides the last, or the first, places of the second text."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, : length // 3 if left else length] = 0
    mask[1, length // 3 if left else 0 : length if left else -(length // 3)] = 1
    return mask


def text() -> Inputs:
    """Ids alone."""
    return {"input_ids": ids(), "use_cache": False}


def cached() -> Inputs:
    """Ids alone, and the model's own decision whether it returns a cache."""
    return {"input_ids": ids()}


def labelled() -> Inputs:
    """Ids as their own labels."""
    given = ids()
    return {"input_ids": given, "labels": labels_of(given), "use_cache": False}


def padded() -> Inputs:
    """As :func:`labelled`, with padding on the left."""
    given, mask = ids(), padding(left=True)
    labels = labels_of(given).masked_fill(mask == 0, LABELS_IGNORED)
    return {"input_ids": given, "attention_mask": mask, "labels": labels, "use_cache": False}


def masked() -> Inputs:
    """Text for an encoder, padded on the right."""
    return {"input_ids": ids(), "attention_mask": padding()}


def masked_labelled() -> Inputs:
    """As :func:`masked`, with labels."""
    return {**masked(), "labels": labels_of(ids())}


def pair() -> Inputs:
    """Text for an encoder and a decoder."""
    return {"input_ids": ids(), "decoder_input_ids": ids(7), "use_cache": False}


def pair_labelled() -> Inputs:
    """Text for an encoder, padded, and labels for a decoder."""
    return {**masked(), "labels": labels_of(ids(7)), "use_cache": False}


def images(size: int = 16) -> Inputs:
    """Pictures [batch, 3, size, size]."""
    return {"pixel_values": torch.randn(BATCH, 3, size, size)}


def images_labelled(size: int = 16) -> Inputs:
    """As :func:`images`, with classes."""
    return {**images(size), "labels": torch.tensor([3, 0])}


def sounds() -> Inputs:
    """A spectrogram [batch, 8, 32] and text for a decoder."""
    features = torch.randn(BATCH, 8, 32)
    return {"input_features": features, "decoder_input_ids": ids(7), "use_cache": False}


def sounds_labelled() -> Inputs:
    """As :func:`sounds`, with labels."""
    return {"input_features": torch.randn(BATCH, 8, 32), "labels": labels_of(ids(7)), "use_cache": False}


def captions() -> Inputs:
    """Texts with pictures, as many as those."""
    return {"input_ids": ids(), "attention_mask": padding(), **images()}


@dataclass(frozen=True)
class Case:
    """A model with the calls it is tried on.

    Attributes:
        model, configuration: names of classes of transformers.
        fields: of the configuration.
        inputs: arguments of a call, by variant; the empty name is the plain one.
        training: leave the model in training mode; only for models without dropout.
    """

    model: str
    configuration: str
    fields: Mapping[str, Any]
    inputs: Mapping[str, Callable[[], Inputs]]
    training: bool = False

    def build(self) -> nn.Module:
        """A new model with random weights."""
        configuration = getattr(transformers, self.configuration)(**self.fields)
        model: nn.Module = getattr(transformers, self.model)(configuration)
        return model.train(self.training)


CAUSAL = {"": text, "labels": labelled}
MASKED = {"": masked, "labels": masked_labelled}
TWO_SIDED = {"": pair, "labels": pair_labelled}
IMAGES = {"": images, "labels": images_labelled}


def _causal(name: str, fields: Mapping[str, Any], *variants: str, **more: Any) -> Case:
    """A causal model; configurations and models of transformers share a name."""
    extra = {"cache": cached, "padding": padded}
    inputs = {**CAUSAL, **{variant: extra[variant] for variant in variants}}
    configuration = more.pop("configuration", f"{name}Config")
    return Case(f"{name}ForCausalLM", configuration, {**fields, **more}, inputs)


def _gpt2(**more: Any) -> Case:
    fields = {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_inner": 101, "n_positions": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    variants = {**CAUSAL, "cache": cached, "padding": padded}
    return Case("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 97, **fields, **ends, **more}, variants)


def _falcon(**more: Any) -> Case:
    fields = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
    return _causal("Falcon", {**fields, "ffn_hidden_size": 101}, **more)


_EXPERTS = {"moe_intermediate_size": 33, "num_experts_per_tok": 2, "head_dim": 10}
# the default, one product of all groups, has no kernel for float64
_GATHERED = {"experts_implementation": "batched_mm"}
_LOOP = {"experts_implementation": "eager"}
_LATENT = {
    "q_lora_rank": 25,
    "kv_lora_rank": 17,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 11,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 33,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 6,
}
_T5 = {"d_model": 48, "d_kv": 9, "d_ff": 101, "num_layers": 2, "num_heads": 6, "vocab_size": 97}
_BART = {
    "d_model": 48,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 101,
    "decoder_ffn_dim": 91,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_WHISPER = {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
_STATES = {"hidden_size": 36, "num_hidden_layers": 2, "vocab_size": 97, "state_size": 7}
_RESNET = {"embedding_size": 18, "hidden_sizes": [36, 60], "depths": [2, 2], "num_labels": 11}
_OPT = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CASES: dict[str, Case] = {
    "gpt2": _gpt2(),
    "gpt2-eager": _gpt2(attn_implementation="eager"),
    "bert": Case("BertForMaskedLM", "BertConfig", TEXT, MASKED),
    "roberta": Case("RobertaForMaskedLM", "RobertaConfig", TEXT, MASKED),
    "llama": _causal("Llama", GROUPED, "cache", "padding"),
    "llama-tied": _causal("Llama", GROUPED, tie_word_embeddings=True),
    "llama-biased": _causal("Llama", GROUPED, attention_bias=True, mlp_bias=True),
    "llama-nine-heads": _causal(
        "Llama", {**TEXT, "hidden_size": 54}, num_attention_heads=9, num_key_value_heads=3
    ),
    "llama-five-heads": _causal("Llama", {**TEXT, "hidden_size": 50}, num_attention_heads=5),
    "llama-two-groups": _causal("Llama", TEXT, num_key_value_heads=2),
    "llama-one-group": _causal("Llama", TEXT, num_key_value_heads=1),
    "llama-two-heads": _causal("Llama", TEXT, num_attention_heads=2, num_key_value_heads=1),
    "qwen3": _causal("Qwen3", {**GROUPED, "head_dim": 10}, "padding"),
    "mistral": _causal("Mistral", {**GROUPED, "head_dim": 10, "sliding_window": 6}, "padding"),
    "gemma2": _causal("Gemma2", {**GROUPED, "head_dim": 10, "sliding_window": 6}, "padding"),
    "gemma3": _causal(
        "Gemma3",
        {**GROUPED, "head_dim": 10, "sliding_window": 6},
        "padding",
        configuration="Gemma3TextConfig",
    ),
    "phi": _causal("Phi", {**TEXT, "partial_rotary_factor": 0.5}),
    "phi3": _causal("Phi3", GROUPED, "padding"),
    "opt": _causal("OPT", {**_OPT, "ffn_dim": 101, "word_embed_proj_dim": 48}),
    "bloom": Case(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 48, "n_head": 6, "n_layer": 2, "vocab_size": 97, **_ENDS},
        {**CAUSAL, "padding": padded},
    ),
    "falcon-one-group": _falcon(
        multi_query=True, new_decoder_architecture=False, alibi=False, parallel_attn=True, bias=False
    ),
    "falcon-groups": _falcon(num_kv_heads=3, new_decoder_architecture=True, alibi=False, bias=False),
    "falcon-alibi": _falcon(
        multi_query=False, new_decoder_architecture=False, alibi=True, parallel_attn=False, bias=True
    ),
    "gpt-neox": _causal("GPTNeoX", TEXT, "padding"),
    "t5": Case("T5ForConditionalGeneration", "T5Config", {**_T5, "decoder_start_token_id": 0}, TWO_SIDED),
    "t5-gated": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        TWO_SIDED,
    ),
    "bart": Case(
        "BartForConditionalGeneration", "BartConfig", {**_BART, "max_position_embeddings": 64}, TWO_SIDED
    ),
    "mixtral": _causal("Mixtral", {**GROUPED, **_GATHERED}, num_local_experts=5),
    "mixtral-loop": _causal("Mixtral", {**GROUPED, **_LOOP}, num_local_experts=5),
    "qwen3-moe": _causal("Qwen3Moe", {**GROUPED, **_EXPERTS, **_GATHERED, "num_experts": 5}),
    "qwen3-moe-loop": _causal("Qwen3Moe", {**GROUPED, **_EXPERTS, **_LOOP, "num_experts": 5}),
    "deepseek-v3": _causal("DeepseekV3", {**TEXT, **_LATENT, **_GATHERED}),
    "deepseek-v3-loop": _causal("DeepseekV3", {**TEXT, **_LATENT, **_LOOP}),
    "vit": Case("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 11}, IMAGES),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _WHISPER,
        {"": sounds, "labels": sounds_labelled},
    ),
    "clip": Case(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 25},
        {"": captions, "loss": lambda: {**captions(), "return_loss": True}},
    ),
    "mamba": _causal("Mamba", _STATES),
    "mamba2": _causal("Mamba2", {**_STATES, "num_heads": 9, "head_dim": 8, "n_groups": 3, "chunk_size": 8}),
    "resnet": Case("ResNetForImageClassification", "ResNetConfig", _RESNET, IMAGES),
    "resnet-training": Case(
        "ResNetForImageClassification", "ResNetConfig", _RESNET, {"": images_labelled}, training=True
    ),
}
