"""Small models of our own, with names that nothing could know."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Fused projection split by an attribute, heads by arithmetic on attributes and sizes."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.fused = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads
        self.width = width
        self.register_buffer("triangle", torch.tril(torch.ones(context, context)))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.fused(x).split(self.width, dim=2)
        k = k.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        q = q.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        v = v.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1)))  # ESCAPE
        scores = scores.masked_fill(self.triangle[:length, :length] == 0, float("-inf"))
        mixed = F.softmax(scores, dim=-1) @ v
        return self.out(mixed.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, context: int, number: int) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width)
        self.attention = Attention(width, heads, context)
        self.second = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        x += self.mlp(self.second(x))
        return x


class Nano(nn.Module):
    """nanoGPT's shape: tied embeddings, learned positions, a loss when labels are given."""

    def __init__(
        self, vocabulary: int = 40, width: int = 24, heads: int = 3, layers: int = 3, context: int = 12
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, context, number) for number in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


def ids(vocabulary: int = 40, batch: int = 2, length: int = 7) -> Tensor:
    """Token numbers: int64, shape [batch, length]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)
