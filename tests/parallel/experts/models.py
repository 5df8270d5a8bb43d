"""Small models with experts: of three families of transformers, and one of our own."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig

from colrow.verify.precision import cast

VOCABULARY = 37

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "experts_implementation": "eager",  # the grouped product takes no float64
}


def mixtral(experts: int = 4) -> nn.Module:
    config = MixtralConfig(
        **_COMMON,
        intermediate_size=10,
        num_key_value_heads=1,
        num_local_experts=experts,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    return _made(config)


def qwen(experts: int = 6) -> nn.Module:
    config = Qwen3MoeConfig(
        **_COMMON,
        intermediate_size=10,
        moe_intermediate_size=6,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=experts,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        decoder_sparse_step=1,
    )
    return _made(config)


def deepseek(experts: int = 8) -> nn.Module:
    """With shared experts, choices among groups of experts, and a first layer without."""
    config = DeepseekV3Config(
        **_COMMON,
        intermediate_size=10,
        moe_intermediate_size=6,
        num_key_value_heads=2,
        n_routed_experts=experts,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=6,
        kv_lora_rank=4,
        qk_rope_head_dim=2,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )
    return _made(config)


def _made(config: transformers.PreTrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:  # their own spread is so small that all tokens would look alike
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return cast(model, torch.float64)


class OwnExperts(nn.Module):
    """Two-layer experts of which every token is given the weights of those it chose."""

    def __init__(self, experts: int, features: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, hidden, features, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(experts, features, hidden, dtype=torch.float64))

    def forward(self, index: Tensor, x: Tensor, *, weights: Tensor) -> Tensor:
        hidden = torch.einsum("tkih,th->tki", self.up[index], x).tanh()
        return (torch.einsum("tkhi,tki->tkh", self.down[index], hidden) * weights[..., None]).sum(1)


class Given(nn.Module):
    """Experts that are chosen by the caller."""

    experts: OwnExperts

    def __init__(self, experts: int = 5, features: int = 6, hidden: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.experts = OwnExperts(experts, features, hidden)
        self.mix = nn.Linear(features, features, dtype=torch.float64)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result: Tensor = self.mix(self.experts(index, self.mix(x), weights=weights.sigmoid())) + x
        return result
