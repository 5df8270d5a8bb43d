"""Small models in plain PyTorch, each with something that models of transformers do not do.

Sizes are small and, where the architecture allows it, odd: no number of ranks divides all of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 97
HIDDEN = 54
HEADS = 6
FEATURES = 101
"""Of a feed-forward part."""
LAYERS = 2
CONTEXT = 32
CLASSES = 11


class Squint(nn.Module):
    """Causal attention as in nanoGPT: one fused projection, sizes by ``C // n_head``, a mask in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.blob = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.mush = nn.Linear(HIDDEN, HIDDEN)
        self.pieces = HEADS
        self.width = HIDDEN
        self.register_buffer("triangle", torch.ones(CONTEXT, CONTEXT).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [batch, sequence, hidden] to the same."""
        B, T, C = x.size()
        q, k, v = self.blob(x).split(self.width, dim=2)
        k = k.view(B, T, self.pieces, C // self.pieces).transpose(1, 2)
        q = q.view(B, T, self.pieces, C // self.pieces).transpose(1, 2)
        v = v.view(B, T, self.pieces, C // self.pieces).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        triangle = self.triangle
        assert isinstance(triangle, Tensor)
        scores = scores.masked_fill(triangle[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.mush(y.transpose(1, 2).contiguous().view(B, T, C))


class Widget(nn.Module):
    """A feed-forward part of bare parameters and ``einsum``, its biases added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(HIDDEN, FEATURES) / 10)
        self.beta = nn.Parameter(torch.randn(FEATURES, HIDDEN) / 10)
        self.a0 = nn.Parameter(torch.randn(FEATURES) / 10)
        self.b0 = nn.Parameter(torch.randn(HIDDEN) / 10)
        self.gain = nn.Parameter(torch.rand(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [batch, sequence, hidden] to the same."""
        z = F.gelu(torch.einsum("btd,dh->bth", x, self.alpha) + self.a0)
        return (torch.einsum("bth,hd->btd", z, self.beta) + self.b0) * self.gain


class Lump(nn.Module):
    """A layer of :class:`Nano`."""

    def __init__(self) -> None:
        super().__init__()
        self.n1 = nn.LayerNorm(HIDDEN)
        self.n2 = nn.LayerNorm(HIDDEN)
        self.eye = Squint()
        self.gizmo = Widget()

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [batch, sequence, hidden] to the same."""
        x = x + self.eye(self.n1(x))
        return x + self.gizmo(self.n2(x))


class Nano(nn.Module):
    """A GPT in the style of nanoGPT with tied embeddings, whose names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Embedding(VOCABULARY, HIDDEN)
        self.bar = nn.Embedding(CONTEXT, HIDDEN)
        self.pile = nn.ModuleList(Lump() for _ in range(LAYERS))
        self.last = nn.LayerNorm(HIDDEN)
        self.out = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.out.weight = self.foo.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits [batch, sequence, vocabulary] of ids [batch, sequence]; the loss if targets are given."""
        x = self.foo(idx) + self.bar(torch.arange(idx.shape[1], device=idx.device))
        for block in self.pile:
            x = block(x)
        logits = self.out(self.last(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class MixerBlock(nn.Module):
    """A layer of :class:`Mixer`."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.n1 = nn.LayerNorm(HIDDEN)
        self.n2 = nn.LayerNorm(HIDDEN)
        self.tokens = nn.Sequential(nn.Linear(patches, 23), nn.GELU(), nn.Linear(23, patches))
        self.channels = nn.Sequential(nn.Linear(HIDDEN, FEATURES), nn.GELU(), nn.Linear(FEATURES, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Patches [batch, patches, hidden] to the same."""
        x = x + self.tokens(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.n2(x))


class Mixer(nn.Module):
    """MLP-Mixer: products over the patches as well as over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, HIDDEN, 4, 4)
        self.blocks = nn.ModuleList(MixerBlock(16) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] of images [batch, 3, 16, 16]."""
        x = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Attention(nn.Module):
    """Attention as in timm: one fused projection to ``[batch, patches, 3, heads, features of a head]``."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.head_dim = HIDDEN // HEADS
        self.attn_dim = HIDDEN
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Patches [batch, patches, hidden] to the same."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, self.attn_dim))


class LayerScale(nn.Module):
    """A learnt factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Patches [batch, patches, hidden] to the same."""
        return x * self.gamma


class Block(nn.Module):
    """A layer of :class:`VisionTransformer`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN)
        self.attn = Attention()
        self.ls1 = LayerScale()
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, FEATURES), nn.GELU(), nn.Linear(FEATURES, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Patches [batch, patches, hidden] to the same."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A vision transformer in timm's style."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, HIDDEN, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, HIDDEN) / 10)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, HIDDEN) / 10)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] of images [batch, 3, 16, 16]."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a classifier."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, FEATURES, 0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits [batch, sequence, classes] of [batch, sequence, hidden], ``padding`` true where unseen."""
        return self.head(self.encoder(x, src_key_padding_mask=padding))


class CrossAttention(nn.Module):
    """``nn.MultiheadAttention`` from one sequence to another of another width, averaged weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, kdim=37, vdim=41, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """``query`` [batch, n, hidden], ``key`` [batch, m, 37], ``value`` [batch, m, 41]."""
        return self.attention(query, key, value)


class Experts(nn.Module):
    """A mixture of experts as a list of modules and a loop, tokens picked out and added back."""

    def __init__(self, experts: int = 5, chosen: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        self.chosen = chosen
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate": nn.Linear(HIDDEN, FEATURES, bias=False),
                    "up": nn.Linear(HIDDEN, FEATURES, bias=False),
                    "down": nn.Linear(FEATURES, HIDDEN, bias=False),
                }
            )
            for _ in range(experts)
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, sequence, vocabulary] of ids [batch, sequence]."""
        x = self.embedding(ids)
        hidden = self.norm(x).view(-1, x.shape[-1])
        weights, indices = self.router(hidden).softmax(-1).topk(self.chosen, -1)
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            tokens, slots = (indices == number).nonzero(as_tuple=True)
            if tokens.numel() == 0:
                continue
            assert isinstance(expert, nn.ModuleDict)
            picked = hidden[tokens]
            features = F.silu(expert["gate"](picked)) * expert["up"](picked)
            result.index_add_(0, tokens, expert["down"](features) * weights[tokens, slots, None])
        return self.head(x + result.view_as(x))
