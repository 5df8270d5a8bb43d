"""Small models with other kinds of attention, written as people write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 97
HIDDEN = 48
HEADS = 6
SIZE = HIDDEN // HEADS
FEATURES = 101


class RMSNorm(nn.Module):
    """Without mean, as everybody writes it."""

    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class ComplexRotary(nn.Module):
    """Llama as it was first published: rotation by complex numbers, keys repeated for groups, a gated MLP."""

    def __init__(self, groups: int = 3) -> None:
        super().__init__()
        self.n_heads, self.n_kv = HEADS, groups
        self.wq = nn.Linear(HIDDEN, HEADS * SIZE, bias=False)
        self.wk = nn.Linear(HIDDEN, groups * SIZE, bias=False)
        self.wv = nn.Linear(HIDDEN, groups * SIZE, bias=False)
        self.wo = nn.Linear(HEADS * SIZE, HIDDEN, bias=False)
        self.w1 = nn.Linear(HIDDEN, FEATURES, bias=False)
        self.w2 = nn.Linear(FEATURES, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, FEATURES, bias=False)
        self.attention_norm, self.ffn_norm = RMSNorm(), RMSNorm()

    def rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        """``[batch, sequence, heads, size]`` turned by complex ``[sequence, size / 2]``."""
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * angles[None, :, None]).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        B, T, _ = x.shape
        steps = torch.arange(0, SIZE, 2, dtype=x.dtype) / SIZE
        angles = torch.outer(torch.arange(T, dtype=x.dtype), 1.0 / 10000**steps)
        turns = torch.polar(torch.ones_like(angles), angles)
        h = self.attention_norm(x)
        q = self.rotate(self.wq(h).view(B, T, self.n_heads, SIZE), turns)
        k = self.rotate(self.wk(h).view(B, T, self.n_kv, SIZE), turns)
        v = self.wv(h).view(B, T, self.n_kv, SIZE)
        repeats = self.n_heads // self.n_kv
        k = k[:, :, :, None].expand(B, T, self.n_kv, repeats, SIZE).reshape(B, T, self.n_heads, SIZE)
        v = torch.repeat_interleave(v, repeats, dim=2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(SIZE)
        scores = scores + torch.full((T, T), float("-inf")).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + self.wo(mixed)
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Windows(nn.Module):
    """Swin: windows of 4 by 4, shifted by a roll, biases looked up by relative position."""

    def __init__(self, side: int = 8, window: int = 4, shift: int = 2) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, HEADS))
        places = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        relative = (places[:, :, None] - places[:, None]) + window - 1
        self.register_buffer("index", relative[0] * (2 * window - 1) + relative[1])
        self.norm = nn.LayerNorm(HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, FEATURES), nn.GELU(), nn.Linear(FEATURES, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, side * side, hidden]`` to the same."""
        B, L, C = x.shape
        s, w = self.side, self.window
        h = torch.roll(self.norm(x).view(B, s, s, C), (-self.shift, -self.shift), (1, 2))
        h = h.view(B, s // w, w, s // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)
        qkv = self.qkv(h).reshape(h.shape[0], w * w, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (C // HEADS) ** -0.5, qkv[1], qkv[2]
        index = self.index
        assert isinstance(index, Tensor)
        bias = self.table[index.view(-1)].view(w * w, w * w, -1).permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        h = self.proj((weights @ v).transpose(1, 2).reshape(-1, w * w, C))
        h = h.view(B, s // w, s // w, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, s, s, C)
        x = x + torch.roll(h, (self.shift, self.shift), (1, 2)).view(B, L, C)
        return x + self.mlp(x)


class LinearAttention(nn.Module):
    """Keys and values are summed first, all of it with einsum and raw parameters by head."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(HIDDEN, HEADS, SIZE) / 7)
        self.k = nn.Parameter(torch.randn(HIDDEN, HEADS, SIZE) / 7)
        self.v = nn.Parameter(torch.randn(HIDDEN, HEADS, SIZE) / 7)
        self.o = nn.Parameter(torch.randn(HEADS, SIZE, HIDDEN) / 7)
        self.bias = nn.Parameter(torch.randn(HEADS, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        q = F.elu(torch.einsum("bnd,dhe->bhne", x, self.q)) + 1
        k = F.elu(torch.einsum("bnd,dhe->bhne", x, self.k)) + 1
        v = torch.einsum("bnd,dhe->bhne", x, self.v) + self.bias[None, :, None]
        state = torch.einsum("bhnd,bhne->bhde", k, v)
        weight = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
        mixed = torch.einsum("bhnd,bhde,bhn->bhne", q, state, weight)
        return x + torch.einsum("bhne,heo->bno", mixed, self.o)


class Latents(nn.Module):
    """Perceiver: learnt latents ask a longer sequence, with ``F.scaled_dot_product_attention`` for groups."""

    def __init__(self, latents: int = 5) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, HIDDEN))
        self.to_q = nn.Linear(HIDDEN, HEADS * SIZE, bias=False)
        self.to_kv = nn.Linear(HIDDEN, 2 * 3 * SIZE, bias=False)
        self.to_out = nn.Linear(HEADS * SIZE, HIDDEN)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to ``[batch, latents, hidden]``."""
        queries = self.latents.expand(x.shape[0], -1, -1)
        q = self.to_q(queries).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        k, v = (each.unflatten(-1, (-1, SIZE)).transpose(1, 2) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return queries + self.to_out(mixed.transpose(1, 2).flatten(2)) * (1 + self.gate.tanh())


class Slopes(nn.Module):
    """ALiBi with slopes in a buffer, one projection with biases per head interleaved: heads x (q, k, v)."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        B, T, C = x.shape
        q, k, v = self.projection(x).view(B, T, HEADS, 3, SIZE).unbind(3)
        slopes = self.slopes
        assert isinstance(slopes, Tensor)
        distance = torch.arange(T)[None] - torch.arange(T)[:, None]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / SIZE**0.5 + slopes[:, None, None] * distance
        scores = scores.masked_fill(distance > 0, torch.finfo(x.dtype).min)
        return x + self.out(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, T, C))


class Shared(nn.Module):
    """One layer used three times, as in ALBERT, with talking heads and a norm of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.q_norm, self.k_norm = RMSNorm(SIZE), RMSNorm(SIZE)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        for _ in range(3):
            q, k, v = (
                each.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
                for each in self.qkv(x).split(HIDDEN, dim=-1)
            )
            weights = (self.q_norm(q) @ self.k_norm(k).mT * self.temperature).softmax(-1)
            x = x + self.out((weights @ v).transpose(1, 2).flatten(-2))
        return x


class Translator(nn.Module):
    """``nn.Transformer``: encoder, decoder, masks, and logits by the transposed embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.transformer = nn.Transformer(HIDDEN, HEADS, 1, 2, FEATURES, 0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits [batch, m, vocabulary] of ids [batch, n] and [batch, m]."""
        mask = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], dtype=self.embedding.weight.dtype
        )
        hidden = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask)
        return F.linear(hidden, self.embedding.weight)


class Head(nn.Module):
    """One head of :class:`SeparateHeads`."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(HIDDEN, SIZE, bias=False)
        self.query = nn.Linear(HIDDEN, SIZE, bias=False)
        self.value = nn.Linear(HIDDEN, SIZE, bias=False)
        self.register_buffer("tril", torch.ones(16, 16).tril())

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to ``[batch, sequence, size]``."""
        _, T, _ = x.shape
        k, q = self.key(x), self.query(x)
        tril = self.tril
        assert isinstance(tril, Tensor)
        weights = (q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5).masked_fill(
            tril[:T, :T] == 0, float("-inf")
        )
        return F.softmax(weights, dim=-1) @ self.value(x)


class SeparateHeads(nn.Module):
    """Attention as in lectures: every head a module of its own, their results concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head() for _ in range(HEADS))
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class FusedBlock(nn.Module):
    """Attention and feed-forward side by side, with one projection in and one out for both."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (HIDDEN, HIDDEN, HIDDEN, FEATURES)
        self.norm = nn.LayerNorm(HIDDEN)
        self.first = nn.Linear(HIDDEN, sum(self.sizes), bias=False)
        self.last = nn.Linear(HIDDEN + FEATURES, HIDDEN, bias=False)
        self.q_norm, self.k_norm = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        *heads, features = self.first(self.norm(x)).split(self.sizes, dim=-1)
        q, k, v = (each.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for each in heads)
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return x + self.last(torch.cat([mixed.transpose(1, 2).flatten(2), F.gelu(features)], dim=-1))


class TiedNorms(nn.Module):
    """Keys and queries of one head go through norms of the same weight; the last keys are used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.q_norm, self.k_norm = RMSNorm(SIZE), RMSNorm(SIZE)
        self.k_norm.weight = self.q_norm.weight
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        keys = self.k_norm(self.k(x).unflatten(-1, (HEADS, SIZE)))
        for _ in range(2):
            queries = self.q_norm(self.q(x).unflatten(-1, (HEADS, SIZE)))
            x = x + self.out((queries * keys.sigmoid()).flatten(2))
            keys = self.k_norm(self.k(x).unflatten(-1, (HEADS, SIZE)))
        return x
