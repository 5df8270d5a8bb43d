"""What the fields of a configuration mean, by the words of their names.

These are the words that transformers' configurations share. A field whose name says nothing stays as it is,
and so do those whose role is ``kept``, which look like sizes but are steps, kinds or positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

Role = Literal[
    "layers",
    "heads",
    "head size",
    "width",
    "inner width",
    "vocabulary",
    "token",
    "experts",
    "chosen experts",
    "expert groups",
    "image",
    "positions",
    "queries",
    "kept",
]

_PATTERNS: tuple[tuple[Role, tuple[str, ...]], ...] = (
    ("vocabulary", (r"vocab_size", r"vocab$", r"^num_embeddings$")),
    (
        "token",
        (
            r"token_ids?$",
            r"token_index$",
            r"^(pad|bos|eos|mask|unk)_index$",
            r"(start|end|patch|newline)_id$",
        ),
    ),
    ("experts", (r"(num|n)_(\w+_)?experts$", r"expert_num$")),
    ("chosen experts", (r"experts_per_tok(en)?$", r"^moe_(topk|k|top_k)$", r"^top_k_experts$")),
    ("expert groups", (r"^n_group$", r"^topk_group$", r"^num_expert_group$")),
    ("image", (r"^(image|img|crop|pretrain_image|max_img|max_image)_size$", r"^resolution$")),
    (
        "positions",
        (r"max_position_embeddings$", r"^n_positions$", r"^n_ctx$", r"max_(source|target)_positions$"),
    ),
    ("queries", (r"^num_queries$", r"num_proposals$", r"^num_denoising$")),
    (
        "kept",
        (
            r"(kernel|patch|window|chunk|batch|block|step|group|merge|pool|roi|cache|grid|stride)_sizes?$",
            r"(frame|type|tubelet|spec|input|context|mask|background|codebook|image_embedding|feat)_sizes?$",
            r"layer_norm|layer_scale|conv_kernel|position_embedding|_per_stage$",
            r"^num_(channels|mel_bins)$|^(model_in|mel)_dim$",
            r"^in_(channels|chans)$",
            r"^audio_channels$",
            r"num_feat_extract_layers",
        ),
    ),
    (
        "layers",
        (
            r"(^|_)(n|num)(_\w+)?_(layers?|blocks)$",
            r"_layers$|^first_k_dense",
            r"^layers$",
            r"(^|_)depth$",
            r"^n_layer$",
            r"^(depths|blocks_per_stage|stage_num_blocks|stage_numb_of_layers|num_block_repeats)$",
        ),
    ),
    ("heads", (r"heads$", r"^n_head$", r"_heads_", r"num_key_value_groups", r"^(mamba_)?n_groups$")),
    (
        "head size",
        (
            r"head_(dim|size)$",
            r"^d_kv$",
            r"^kv_channels$",
            r"d_head$",
            r"headdim$",
            r"dim_head$",
            r"^rotary_dim$",
        ),
    ),
    (
        "inner width",
        (
            r"intermediate|ffn|feed_?forward",
            r"^d_?ff$",
            r"^(n|d)_inner$",
            r"mlp_dim",
            r"share_expert_dim",
            r"linear_units",
        ),
    ),
    (
        "width",
        (
            r"(size|sizes|dim|dims|channels?|width|units|features|filters|rank|hidden_size_global)$",
            r"^(d_model|n_embd|d_latents)$",
            r"^dim_|_dim_|_channels_list$",
        ),
    ),
)
_COMPILED = tuple((role, re.compile("|".join(patterns))) for role, patterns in _PATTERNS)


def role_of(name: str, standard_names: Mapping[str, str]) -> Role:
    """What a field means.

    Args:
        name: as the configuration calls it.
        standard_names: transformers' name of a field by the configuration's.
    """
    for candidate in (standard_names.get(name, ""), name):
        for role, pattern in _COMPILED:
            if candidate and pattern.search(candidate):
                return role
    return "kept"
