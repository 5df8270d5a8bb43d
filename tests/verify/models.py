"""Small models for verifications: functions without arguments, that can be sent to ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 67


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=36,
        intermediate_size=41,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=32,
        attention_dropout=0.3,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def qwen3() -> nn.Module:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=41,
        num_hidden_layers=2,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config)


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=20,
        n_layer=2,
        n_head=5,
        n_inner=41,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def mixtral() -> nn.Module:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=4,
        num_local_experts=5,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    config._experts_implementation = "eager"  # what it calls by default takes no float64 on CPUs
    return MixtralForCausalLM(config)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=41,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return BertForMaskedLM(config)


def tokens(rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Ids, labels of which some are ignored, and a mask with padding on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :4] = -100
    mask[0, :2] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class Bare(nn.Module):
    """Two matrices and biases of its own, added by hand; what is added last is added to a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(8, 22)), nn.Parameter(torch.randn(22, 8))
        self.inner, self.outer = nn.Parameter(torch.randn(22)), nn.Parameter(torch.randn(8))
        self.scale = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(x @ self.up + self.inner) * self.scale
        return hidden @ self.down + self.outer


class Bricks(nn.Module):
    """Two bare layers with residuals between two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.bricks = nn.ModuleList(Bare() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for brick in self.bricks:
            x = x + brick(self.norm(x))
        return self.last(x)  # type: ignore[no-any-return]


def bricks(rows: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and the keywords of a call."""
    return Bricks(), {"x": torch.randn(rows, 7, 5)}


class Steep(nn.Module):
    """Equal results from equal parameters; from parameters that differ in rounding, other gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(1e-4 * torch.rand(6))
        self.up, self.down = nn.Linear(6, 11), nn.Linear(11, 6)

    def forward(self, x: Tensor) -> Tensor:
        steep = torch.sin(1e13 * self.scale) / 1e13
        return self.down(torch.tanh(self.up(x * self.scale))) + steep


class Shares(nn.Module):
    """All gradients are zero, but for rounding: shares sum to one whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 333), nn.Linear(333, 64)

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(self.down(torch.tanh(self.up(x))), -1)
        return (0.1 * shares).sum(-1) + 3.0


class Filtered(nn.Module):
    """Complex weights, which mix the features of real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(12, 10)
        self.filter = nn.Parameter(torch.randn(10, dtype=torch.complex64))
        self.mix = nn.Parameter(torch.randn(10, 7, dtype=torch.complex64) / 4)
        self.bias = nn.Parameter(torch.zeros(7, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real((self.into(x) * self.filter) @ self.mix + self.bias)
