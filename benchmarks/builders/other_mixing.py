"""Small models without attention, or with more than it: recurrent, convolutional, spectral, sparse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from other_attention import FEATURES, HIDDEN, VOCABULARY
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recurrent(nn.Module):
    """A language model with ``nn.LSTM``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.rnn = nn.LSTM(HIDDEN, 37, num_layers=2, batch_first=True)
        self.head = nn.Linear(37, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of ids [batch, sequence], or without labels logits [batch, sequence, vocabulary]."""
        hidden, _ = self.rnn(self.embedding(ids))
        logits = self.head(hidden)
        if labels is None:
            return logits
        return F.nll_loss(F.log_softmax(logits, dim=-1).flatten(0, 1), labels.flatten())


class Gated(nn.Module):
    """A recurrence written as a loop, with gates of one projection each of input and state."""

    def __init__(self, width: int = 35) -> None:
        super().__init__()
        self.width = width
        self.inner = nn.Linear(HIDDEN, 3 * width)
        self.state = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        h = x.new_zeros(x.shape[0], self.width)
        states = []
        for inner in self.inner(x).unbind(1):
            r, z, n = inner.chunk(3, -1)
            hr, hz, hn = self.state(h).chunk(3, -1)
            update = torch.sigmoid(z + hz)
            h = update * h + (1 - update) * torch.tanh(n + torch.sigmoid(r + hr) * hn)
            states.append(h)
        return self.out(torch.stack(states, 1))


class Mobile(nn.Module):
    """Inverted bottlenecks: grouped convolutions, batch norms, squeeze and excitation, channel shuffle."""

    def __init__(self, channels: int = 12, wide: int = 30) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (channels, wide, wide, channels))
        self.expand = nn.Conv2d(channels, wide, 1, bias=False)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.squeeze = nn.Conv2d(wide, 7, 1)
        self.excite = nn.Conv2d(7, wide, 1)
        self.project = nn.Conv2d(wide, channels, 1, bias=False)
        self.grouped = nn.Conv2d(channels, 24, 3, groups=3)
        self.head = nn.Linear(24, 11)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 11] of images [batch, 3, 16, 16]."""
        x = F.hardswish(self.norms[0](self.stem(images)))
        h = F.relu6(self.norms[1](self.expand(x)))
        h = F.relu6(self.norms[2](self.depthwise(h)))
        h = h * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))
        x = x + self.norms[3](self.project(h))
        x = F.channel_shuffle(self.grouped(x), 3)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """DenseNet and U-Net: channels concatenated, down and up again, by pixel shuffle too."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 10, 3, padding=1)
        self.two = nn.Conv2d(13, 14, 3, padding=1, stride=2)
        self.norm = nn.GroupNorm(2, 14)
        self.up = nn.ConvTranspose2d(14, 9, 2, stride=2)
        self.three = nn.Conv2d(22, 12, 1)
        self.last = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch, 3, 2 x 16, 2 x 16] of images [batch, 3, 16, 16]."""
        a = F.relu(self.one(images))
        b = F.leaky_relu(self.norm(self.two(torch.cat([images, a], 1))), 0.1)
        c = F.gelu(self.up(b))
        d = self.three(torch.cat([images, a, c], 1))
        return self.last(F.pixel_shuffle(d, 2)) + F.interpolate(images, scale_factor=2.0, mode="bilinear")


class Spectral(nn.Module):
    """FNet's Fourier transform, gMLP's gate over positions, and a causal convolution of one channel each."""

    def __init__(self, length: int = 10) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.wide = nn.Linear(HIDDEN, 2 * FEATURES)
        self.gate_norm = nn.LayerNorm(FEATURES)
        self.places = nn.Linear(length, length)
        self.narrow = nn.Linear(FEATURES, HIDDEN)
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, groups=HIDDEN, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 10, hidden]`` to the same."""
        x = x + torch.fft.fft2(x).real
        u, v = F.gelu(self.wide(self.norm(x))).chunk(2, -1)
        x = x + self.narrow(u * self.places(self.gate_norm(v).mT).mT)
        return x + self.conv(x.mT)[..., : x.shape[1]].mT


class StateSpace(nn.Module):
    """A selective state space by a loop over time, written with shapes taken from tensors."""

    def __init__(self, inner: int = 30, states: int = 7, rank: int = 5) -> None:
        super().__init__()
        self.sizes = (rank, states, states)
        self.in_proj = nn.Linear(HIDDEN, 2 * inner, bias=False)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, HIDDEN, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        x, gate = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(x)
        delta, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        delta = F.softplus(self.dt_proj(delta))
        decay = torch.exp(delta[..., None] * -torch.exp(self.A_log))
        h = torch.zeros(x.shape[0], x.shape[2], self.A_log.shape[1], dtype=x.dtype)
        outputs = []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
            outputs.append((h * C[:, t, None]).sum(-1))
        y = torch.stack(outputs, 1) + x * self.D
        return u + self.out_proj(y * F.silu(gate))


class Switch(nn.Module):
    """Experts by one-hot dispatch, stacked: everything is a product, nothing depends on data."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, experts)
        self.w_in = nn.Parameter(torch.randn(experts, HIDDEN, FEATURES) / 7)
        self.b_in = nn.Parameter(torch.randn(experts, 1, FEATURES))
        self.w_out = nn.Parameter(torch.randn(experts, FEATURES, HIDDEN) / 7)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        dispatch = F.one_hot(chosen, self.w_in.shape[0]).to(x.dtype)
        combine = torch.einsum("nke,nk->ne", dispatch, weights / weights.sum(-1, keepdim=True))
        hidden = F.relu(torch.matmul(tokens, self.w_in) + self.b_in).square()
        return x + torch.einsum("enh,ehd,ne->nd", hidden, self.w_out, combine).view_as(x)


class Recommender(nn.Module):
    """DLRM: bags of embeddings, pairwise products of features, one number per row."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, HIDDEN, mode="sum") for n in (13, 29))
        self.bottom = nn.Sequential(
            nn.Linear(9, FEATURES), nn.ReLU(inplace=True), nn.Linear(FEATURES, HIDDEN)
        )
        self.top = nn.Sequential(nn.Linear(HIDDEN + 3, 31), nn.PReLU(31), nn.Linear(31, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Probabilities [batch] of numbers [batch, 9] and indices [2, batch, 4]."""
        first = self.bottom(dense)
        features = torch.stack(
            [first, *(bag(index) for bag, index in zip(self.bags, sparse, strict=True))], 1
        )
        products = torch.bmm(features, features.transpose(1, 2))
        rows, columns = torch.tril_indices(3, 3, -1)
        return torch.sigmoid(self.top(torch.cat([first, products[:, rows, columns]], 1))).squeeze(-1)


class Graph(nn.Module):
    """Attention over the edges of a graph, scattered to nodes."""

    def __init__(self, heads: int = 3, width: int = 11) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.linear = nn.Linear(HIDDEN, heads * width, bias=False)
        self.source = nn.Parameter(torch.randn(1, heads, width))
        self.target = nn.Parameter(torch.randn(1, heads, width))
        self.out = nn.Linear(heads * width, HIDDEN)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """``[nodes, hidden]`` to the same, along edges [2, edges]."""
        h = self.linear(nodes).view(-1, self.heads, self.width)
        start, end = edges
        scores = F.leaky_relu((h * self.source).sum(-1)[start] + (h * self.target).sum(-1)[end], 0.2)
        weights = torch.exp(scores - scores.max())
        total = torch.zeros(len(nodes), self.heads, dtype=h.dtype).index_add(0, end, weights)
        messages = h[start] * (weights / total[end])[..., None]
        mixed = torch.zeros_like(h).index_add(0, end, messages)
        return nodes + self.out(F.elu(mixed).flatten(1))


class Adapted(nn.Module):
    """Low-rank adapters beside frozen weights, a weight-normed layer, a bilinear one."""

    def __init__(self, rank: int = 5) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, FEATURES)
        self.base.requires_grad_(False)
        self.down = nn.Linear(HIDDEN, rank, bias=False)
        self.up = nn.Linear(rank, FEATURES, bias=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, HIDDEN))
        self.bilinear = nn.Bilinear(HIDDEN, HIDDEN, 13)
        self.last = nn.Linear(13, HIDDEN)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        h = F.mish(self.base(x) + self.dropout(self.up(self.down(x))) * 2.0)
        y = self.normed(h)
        return x + self.last(torch.tanh(self.bilinear(x, y)))


class Quantised(nn.Module):
    """An autoencoder with a codebook: nearest entries, gradients passed straight through, two losses."""

    def __init__(self, codes: int = 17, width: int = 20) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.codebook = nn.Parameter(torch.randn(codes, width))
        self.decoder = nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [batch, 3, 16, 16] again, and a loss."""
        z = self.encoder(images).permute(0, 2, 3, 1)
        nearest = torch.cdist(z.reshape(-1, z.shape[-1]), self.codebook).argmin(1)
        chosen = self.codebook[nearest].view(z.shape)
        loss = F.mse_loss(chosen.detach(), z) + F.mse_loss(chosen, z.detach())
        passed = z + (chosen - z).detach()
        return self.decoder(passed.permute(0, 3, 1, 2)), loss


class Dispatched(nn.Module):
    """Experts with room for so many tokens each: every token to one place, an auxiliary loss for balance."""

    def __init__(self, experts: int = 4, room: int = 20) -> None:
        super().__init__()
        self.experts, self.room = experts, room
        self.router = nn.Linear(HIDDEN, experts)
        self.w_in = nn.Parameter(torch.randn(experts, HIDDEN, FEATURES) / 7)
        self.w_out = nn.Parameter(torch.randn(experts, FEATURES, HIDDEN) / 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[batch, sequence, hidden]`` to the same, and a loss."""
        tokens = x.flatten(0, 1)
        scores = self.router(tokens).softmax(-1)
        gate, chosen = scores.max(-1)
        one_hot = F.one_hot(chosen, self.experts)
        place = (one_hot.cumsum(0) * one_hot).sum(-1) - 1
        dispatch = (one_hot[:, :, None] * F.one_hot(place, self.room)[:, None]).to(x.dtype)
        inside = torch.bmm(torch.einsum("nec,nd->ecd", dispatch, tokens), self.w_in).relu()
        outside = torch.einsum("nec,ecd->nd", dispatch, torch.bmm(inside, self.w_out)) * gate[:, None]
        balance = (scores.mean(0) * one_hot.to(x.dtype).mean(0)).sum() * self.experts
        return x + outside.view_as(x), balance


class Recomputed(nn.Module):
    """Layers whose activations are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, FEATURES), nn.GELU(), nn.Linear(FEATURES, HIDDEN))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to the same."""
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return x
