"""The models in plain PyTorch and transformers, without parallelism."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from ..shapes import Case, Shape
from .trainer import dtype_of, folder_of_model

NORM_EPSILON = {"gpt": 1e-5, "llama": 1e-6}
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Attention(nn.Module):
    """Causal attention; the number of heads follows from the width of the queries, so that it may be cut."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_size = shape.hidden // shape.heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(shape.hidden, shape.hidden) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, shape.feed_forward)
        self.down = nn.Linear(shape.feed_forward, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.hidden, eps=NORM_EPSILON["gpt"])
        self.attention = Attention(shape)
        self.feed_forward_norm = nn.LayerNorm(shape.hidden, eps=NORM_EPSILON["gpt"])
        self.feed_forward = FeedForward(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Gpt(nn.Module):
    """The GPT that anyone would write: pre-norm blocks, learned positions, an output layer of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.positions = nn.Parameter(torch.empty(1, shape.sequence, shape.hidden))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden, eps=NORM_EPSILON["gpt"])
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        """``logits [batch, sequence, vocabulary]`` and, given labels, the ``loss``."""
        x = self.tokens(input_ids) + self.positions
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return SimpleNamespace(logits=logits, loss=None)
        return SimpleNamespace(logits=logits, loss=next_token_loss(logits, labels))


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 of each token given those before it, as transformers computes it."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def gpt2_configuration(shape: Shape) -> Any:
    """GPT-2 with the sizes and the arithmetic of :class:`Gpt`."""
    return GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.hidden,
        n_head=shape.heads,
        n_inner=shape.feed_forward,
        vocab_size=shape.vocabulary,
        n_positions=shape.sequence,
        activation_function="gelu",
        layer_norm_epsilon=NORM_EPSILON["gpt"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def llama_configuration(shape: Shape) -> Any:
    return LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.feed_forward,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.sequence,
        rms_norm_eps=NORM_EPSILON["llama"],
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def weights(case: Case, folder: Path) -> dict[str, Tensor]:
    """The initial weights by the names of :class:`Gpt` or of transformers' Llama, in fp32."""
    return load_file(
        folder_of_model(folder, case) / ("gpt.safetensors" if is_gpt(case) else "model.safetensors")
    )


def is_gpt(case: Case) -> bool:
    return case.shape.family == "gpt"


def plain_model(case: Case, folder: Path) -> nn.Module:
    """The whole model with its initial weights, as one process would train it."""
    model: nn.Module
    if is_gpt(case):
        model = Gpt(case.shape)
        model.load_state_dict(weights(case, folder))
        return model.to(dtype_of(case))
    model = LlamaForCausalLM.from_pretrained(folder_of_model(folder, case), dtype=dtype_of(case))
    return model
