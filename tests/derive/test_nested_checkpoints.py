"""Checkpoints within checkpoints, around losses and by operator; layers that are called twice on a value."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.pool import Pool, worker_mesh

WIDTH, IDS = 8, 23
Ranks = Callable[[int], Pool]

plain = partial(checkpoint, use_reentrant=False)
reentrant = partial(checkpoint, use_reentrant=True)


class Block(nn.Module):
    """Attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 30), nn.Linear(30, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (one(y).unflatten(-1, (-1, 2)).transpose(1, 2) for one in (self.q, self.k, self.v))
        x = x + self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """``course(model, x)`` says how its blocks are called."""

    def __init__(self, course: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.course = nn.Parameter(torch.rand(WIDTH)), course
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.embedding, self.head = nn.Embedding(IDS, WIDTH), nn.Linear(WIDTH, IDS, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.labels = labels
        return self.course(self, self.embedding(ids) * self.scale)

    def loss(self, x: Tensor) -> Tensor:
        """The mean cross-entropy."""
        return F.cross_entropy(self.head(x).flatten(0, 1), self.labels.flatten())


def nested(way: Any, model: Model, x: Tensor, inner: Any = plain) -> Tensor:
    first, second, third, fourth = model.blocks

    def two(x: Tensor) -> Tensor:
        return way(second, inner(first, x)).tanh()

    def three(x: Tensor) -> Tensor:
        return third(way(two, x))

    return model.loss(fourth(way(three, x)))


def without_early_stop(model: Model, x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return nested(plain, model, x)


def each_without_early_stop(model: Model, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = plain(block, x, early_stop=False)
    return model.loss(x)


def of_loss(way: Any, model: Model, x: Tensor) -> Tensor:
    return way(model.loss, plain(model.blocks[0], x)) ** 2


def of_loss_within(model: Model, x: Tensor) -> Tensor:
    return plain(lambda x: plain(model.loss, plain(model.blocks[0], x)).exp(), x)


def by_operator(operators: list[str], model: Model, x: Tensor) -> Tensor:
    chosen = [getattr(torch.ops.aten, name).default for name in operators]
    contexts = partial(create_selective_checkpoint_contexts, chosen)
    for block in model.blocks:
        x = plain(block, x, context_fn=contexts)
    return model.loss(x)


COURSES: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "plain": partial(nested, plain),
    "reentrant": partial(nested, reentrant, inner=reentrant),
    "plain in reentrant": partial(nested, reentrant),
    "reentrant in plain": partial(nested, plain, inner=reentrant),
    "without early stop": without_early_stop,
    "each without early stop": each_without_early_stop,
    "loss": partial(of_loss, plain),
    "loss reentrant": partial(of_loss, reentrant),
    "loss within": of_loss_within,
    "products kept": partial(by_operator, ["addmm", "mm", "bmm"]),
    "activations kept": partial(by_operator, ["tanh"]),
}
OTHERS = {"plain", "reentrant in plain", "each without early stop", "loss", "activations kept"}
"""Those for which others stand where time is short."""


def _verified(size: int, build: Callable[[], nn.Module], inputs: dict[str, Tensor], sequence: bool) -> Report:
    torch.manual_seed(1)
    examples = {"training": Example((), inputs)}
    return verify_on_ranks(build(), examples, worker_mesh(size), steps=1, sequence=sequence)


@pytest.mark.parametrize(
    ("course", "sequence"),
    [
        *(pytest.param(name, False, marks=[pytest.mark.slow] * (name in OTHERS)) for name in COURSES),
        ("plain", True),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("loss within", "products kept")),
    ],
)
def test_recomputed(ranks: Ranks, course: str, sequence: bool) -> None:
    ids = torch.randint(IDS, (2, 7))
    build = partial(Model, COURSES[course])
    report = ranks(2).run(_verified, 2, build, {"ids": ids, "labels": ids}, sequence)[0]
    report.raise_if_different()
    assert report.plan.prediction is not None
    # checkpoints do communicate again
    again = [one for one in report.plan.prediction.collectives if one.direction == "backward"]
    assert sum(one.count for one in again if one.label.startswith(("exit", "loss"))) > 0


class Twice(nn.Module):
    """Layers that are called again on a value: alone, beside another, in a block, in a checkpoint."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.down = nn.Linear(WIDTH, 30), nn.Linear(WIDTH, 30), nn.Linear(30, WIDTH)
        self.block, self.norm, self.way = Block(), nn.LayerNorm(WIDTH), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) * 2
        if self.way == "block":
            return self.block(x) + self.block(x)
        if self.way == "checkpoint":
            return plain(self._features, x) + self._features(x)
        hidden = torch.tanh(self.first(x)) * torch.sigmoid(self.first(x))
        if self.way == "beside":
            hidden = hidden * self.second(x)
        return self.down(hidden)

    def _features(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.first(x)))


@pytest.mark.parametrize("way", ["alone", "beside", "block", "checkpoint"])
def test_one_value_read_twice_is_entered_once(ranks: Ranks, way: str) -> None:
    report = ranks(2).run(_verified, 2, partial(Twice, way), {"x": torch.randn(2, 7, WIDTH)}, False)[0]
    report.raise_if_different()
    if way in ("alone", "beside"):
        assert report.plan.prediction is not None
        (entered,) = [one for one in report.plan.prediction.collectives if one.direction == "backward"]
        assert entered.count == 1
        assert report.plan.entries[0].repeated
