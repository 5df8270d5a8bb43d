"""What a program may do to tokens between two layers of attention: what is computed, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.context.models import VOCABULARY, Layer

WIDTH = 24


class Case(nn.Module):
    """Two layers, and what ``change`` does in between to [batch, tokens, width]."""

    def __init__(self, change: Callable[[Case, Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change = change
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.tables = nn.ParameterList(torch.randn(1, 40, WIDTH) for _ in range(4))
        self.layers = nn.ModuleList(Layer(WIDTH, 2) for _ in range(2))
        self.double()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, tokens, width]."""
        x = self.layers[0](self.tokens(ids))
        result: Tensor = self.layers[1](self.change(self, x, ids, mask))
        return result


class Ends(nn.Module):
    """Two layers, and an end that makes of [batch, tokens, width] what is not one for each token."""

    def __init__(self, end: Callable[[Ends, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.end = end
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH, 2) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        self.seen: Tensor | None = None
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        """Whatever the end makes."""
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        self.seen = ids
        result: Tensor = self.end(self, x)
        self.seen = None
        return result


GATHERED: dict[str, Callable[..., Tensor]] = {
    "mean": lambda model, x: model.head(x.mean(1)),
    "last token": lambda model, x: model.head(x[:, -1]),
    "first token": lambda model, x: model.head(x[:, 0]),
    "largest": lambda model, x: model.head(x.amax(1)),
    "norm": lambda model, x: x.norm(),
    "of classes": lambda model, x: F.cross_entropy(model.head(x.mean(1)), torch.tensor([2, 0])),
    "mean by sum": lambda model, x: (y := x.tanh().flatten(0, 1).clone()).sum(0) / float(len(y)),
    "products": lambda model, x: model.head(x.mT @ x),
    "last that counts": lambda model, x: model.head(
        x[torch.arange(2), (torch.arange(x.shape[1]) * (model.seen != 3).int()).argmax(-1)]
    ),
    "mean of some": lambda model, x: (
        (x * (model.seen > 30)[..., None]).sum(1) / (model.seen > 30).sum(1, True)
    ),
    "loss of some": lambda model, x: (
        F.cross_entropy(model.head(x).flatten(0, 1), model.seen.flatten() % 3, reduction="none")
        * (model.seen.flatten() > 20)
    ).mean(),
}
"""Ends for which the tokens of all ranks are gathered."""


def all_computed(model: Case, x: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """One after the other."""
    for change in COMPUTED.values():
        x = change(model, x, ids, mask)
    return x


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers[:, None].to(like.dtype)


COMPUTED: dict[str, Callable[..., Tensor]] = {
    "flattened": lambda model, x, ids, mask: x.reshape(-1, WIDTH).tanh().view(x.shape),
    "softmax of features": lambda model, x, ids, mask: x.softmax(-1),
    "positions": lambda model, x, ids, mask: x + _column(torch.arange(x.shape[1]), x),
    "positions from 3": lambda model, x, ids, mask: x + _column(torch.arange(3, x.shape[1] + 3), x),
    "positions backwards": lambda model, x, ids, mask: x + _column(torch.arange(x.shape[1], 0, -1), x),
    "parts of one": lambda model, x, ids, mask: x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None],
    "learned positions": lambda model, x, ids, mask: x + model.tables[0][:, : x.shape[1]],
    "learned positions from 2": lambda model, x, ids, mask: x + model.tables[1][:, 2 : x.shape[1] + 2],
    "learned positions backwards": lambda model, x, ids, mask: x + model.tables[2][:, : x.shape[1]].flip(1),
    "looked up positions": lambda model, x, ids, mask: x + model.tables[3][0][torch.arange(x.shape[1])],
    "every other": lambda model, x, ids, mask: x * _column(torch.arange(x.shape[1]) % 2 == 0, x),
    "whole triangle": lambda model, x, ids, mask: (
        x + torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril().sum(1)[:, None]
    ),
    "kernel of one": lambda model, x, ids, mask: F.conv1d(x.mT, model.layers[0].out.weight[..., None]).mT,
    "mask": lambda model, x, ids, mask: x if bool(mask.all()) else x.flip(1),
    "masked": lambda model, x, ids, mask: x * mask[..., None] / mask.sum(1)[:, None, None],
}

REFUSED: dict[str, Callable[..., Tensor]] = {
    "roll": lambda model, x, ids, mask: x.roll(1, 1),
    "token before": lambda model, x, ids, mask: x + F.pad(x, (0, 0, 1, -1)),
    "first token": lambda model, x, ids, mask: x + x[:, :1],
    "set first": lambda model, x, ids, mask: x.index_fill(1, torch.tensor([0]), 0.0),
    "pairs": lambda model, x, ids, mask: x.reshape(len(x), x.shape[1] // 2, -1).tanh().view(x.shape),
    "softmax": lambda model, x, ids, mask: x.softmax(1),
    "mean": lambda model, x, ids, mask: x - x.mean((0, 1)),
    "norm": lambda model, x, ids, mask: x / x.norm(),
    "layer norm": lambda model, x, ids, mask: F.layer_norm(x, x.shape[1:]),
    "batch norm": lambda model, x, ids, mask: F.batch_norm(x.mT, None, None, training=True).mT,
    "running sum": lambda model, x, ids, mask: x.cumsum(1),
    "product": lambda model, x, ids, mask: x @ (x.mT @ x),
    "sorted": lambda model, x, ids, mask: x.sort(1).values,
    "convolution": lambda model, x, ids, mask: (
        F.conv1d(x.mT, x.new_ones(WIDTH, 1, 3), None, 1, 1, 1, WIDTH).mT
    ),
    "ids before": lambda model, x, ids, mask: x + model.tokens(ids.roll(1, 1)),
    "local attention": lambda model, x, ids, mask: model.layers[0](x.reshape(2 * len(x), -1, WIDTH)).view(
        x.shape
    ),
    "times length": lambda model, x, ids, mask: x * x.shape[1],
    "square root of length": lambda model, x, ids, mask: x / x.shape[1] ** 0.5,
    "length on the right": lambda model, x, ids, mask: x * (1.0 / x.shape[1]),
    "len": lambda model, x, ids, mask: x * float(len(x[0])),
    "elements": lambda model, x, ids, mask: x / x.numel(),
    "by len": lambda model, x, ids, mask: x * 2 if len(x[0]) > 9 else x,
    "by length": lambda model, x, ids, mask: x * 2 if x.shape[1] > 9 else x,
    "summed mask": lambda model, x, ids, mask: x / mask.sum(),
    "written mean": lambda model, x, ids, mask: x + torch.zeros(WIDTH, dtype=x.dtype).add_(x.mean((0, 1))),
    "written elsewhere": lambda model, x, ids, mask: (
        (held := torch.zeros(1, WIDTH, dtype=x.dtype))[0].add_(x.mean((0, 1))).sum() * 0 + x + held
    ),
    "gate": lambda model, x, ids, mask: x * x.mean(1, keepdim=True).sigmoid(),
    "dropped mean": lambda model, x, ids, mask: x + F.dropout(x.mean(1, keepdim=True)),
}
