"""Small models of several kinds, in float64, with a batch for each."""

from __future__ import annotations

from typing import Any

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
    T5Config,
    T5ForConditionalGeneration,
)

from tests.apply.double import in_double

VOCABULARY, ROWS, LENGTH, IGNORED = 61, 8, 9, -100


class WithSkips(nn.Module):
    """Layers whose results are read again far behind them, a scale that is no layer's, residuals outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 12))
        self.down = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])
        self.up = nn.ModuleList([nn.Linear(24, 12) for _ in range(2)])
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.embedding(ids) * self.scale
        skips = []
        for layer in self.down:
            hidden = torch.tanh(layer(hidden)) + hidden
            skips.append(hidden)
        for layer in self.up:
            hidden = torch.tanh(layer(torch.cat([hidden, skips.pop()], -1)))
        logits = self.head(hidden * self.scale)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def build(name: str) -> nn.Module:
    """The model of a name, with the same weights on each call."""
    torch.manual_seed(0)
    model: nn.Module
    if name in ("llama", "llama tied"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=20,
                intermediate_size=33,
                num_hidden_layers=4,
                num_attention_heads=5,
                num_key_value_heads=1,  # two ranks share it
                head_dim=4,
                tie_word_embeddings=name == "llama tied",
            )
        )
    elif name == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=16,
                n_layer=3,
                n_head=2,
                n_positions=16,
                attn_pdrop=0.0,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    elif name == "bert":
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=24,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                max_position_embeddings=16,
            )
        )
    elif name == "t5":
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY,
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
                dropout_rate=0.0,
            )
        )
    else:
        model = WithSkips()
    return in_double(model)


def batch_of(name: str, step: int = 0, rows: int = ROWS) -> dict[str, Any]:
    """A batch whose micro-batches have different numbers of labels that count, one of them none.

    Lengths differ from step to step.
    """
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (rows, LENGTH - step % 2), generator=generator)
    labels = torch.randint(VOCABULARY, ids.shape, generator=generator) if name == "t5" else ids.clone()
    labels[0, 3:] = IGNORED
    labels[2:4] = IGNORED
    labels[5, :6] = IGNORED
    if name == "skips":
        return {"ids": ids, "labels": labels}
    if name == "t5":
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": labels[:, :6].contiguous()}
    return {"input_ids": ids, "labels": labels}


def example_of(name: str) -> dict[str, Any]:
    """A small batch in which all labels count."""
    batch = {key: item[:2] for key, item in batch_of(name).items()}
    labels = batch["labels"]
    batch["labels"] = torch.arange(labels.numel()).view_as(labels) % VOCABULARY
    return batch


def parts_of(model: nn.Module, batch: dict[str, Any], replicas: int) -> list[dict[str, Any]]:
    """The batches of replicas: its rows in turn."""
    return [{key: item.chunk(replicas)[one] for key, item in batch.items()} for one in range(replicas)]
