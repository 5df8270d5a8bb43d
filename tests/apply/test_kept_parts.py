"""Layers that read the whole of a sequence, keep a part of it and gather it again in the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import colrow
from colrow.apply.kept_parts import KeptParts
from colrow.apply.sequence import GatherSequence, SequenceLength
from colrow.collectives import communicator
from colrow.layers import column_parallel
from colrow.plan import derive_plan
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.derive.sequences import WIDTH, Block, pair, plan_of, same
from tests.pool import Pool, worker_mesh

Ranks = Callable[[int], Pool]


def _layers(size: int, given_parts: bool) -> None:
    """First and second derivatives of two layers beside whole ones."""
    mesh = worker_mesh(size)
    ranks = communicator(mesh)
    torch.manual_seed(1)
    wholes = [nn.Linear(WIDTH, features).double() for features in (7, 10)]
    layers = copy.deepcopy(wholes)
    length = SequenceLength(ranks, "sequence")
    gather = GatherSequence(length, "gather", 1, "R")
    gather.readers = KeptParts(gather, gather.enter, given_parts)
    cut = [column_parallel(layer, mesh, entry=gather.readers) for layer in layers]
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    cotangents = [torch.randn(2, 7, layer.out_features, dtype=torch.float64) for layer in wholes]
    parts = length.parts(7)
    mine = x.detach().split(parts, 1)[ranks.rank].clone().requires_grad_()
    read = mine if given_parts else gather(mine)
    results = [layer(read) for layer in cut]
    expected = [layer(x) for layer in wholes]
    held = [(one.cut.start(ranks.rank), one.cut.stop(ranks.rank)) for one in cut]
    for found, result, (begin, end) in zip(results, expected, held, strict=True):
        torch.testing.assert_close(found, result[..., begin:end])
    local = [one[..., begin:end] for one, (begin, end) in zip(cotangents, held, strict=True)]
    (found,) = torch.autograd.grad(results, mine, local, create_graph=True)
    (gradient,) = torch.autograd.grad(expected, x, cotangents, create_graph=True)
    torch.testing.assert_close(found, gradient.split(parts, 1)[ranks.rank])
    weights = [layer.weight for layer in layers]
    other = [layer.weight for layer in wholes]
    firsts = torch.autograd.grad(results, weights, local, create_graph=True)
    others = torch.autograd.grad(expected, other, cotangents, create_graph=True)
    for one, whole, (begin, end) in zip(firsts, others, held, strict=True):
        torch.testing.assert_close(one, whole[begin:end])
    # what is on one rank only, and what is: of the parts of a sum
    (sum(one.square().sum() for one in firsts) + found.square().sum()).backward()
    (sum(one.square().sum() for one in others) + gradient.square().sum()).backward()
    assert mine.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(mine.grad, x.grad.split(parts, 1)[ranks.rank])
    for layer, whole, (begin, end) in zip(layers, wholes, held, strict=True):
        assert layer.weight.grad is not None
        assert whole.weight.grad is not None
        torch.testing.assert_close(layer.weight.grad, whole.weight.grad[begin:end])


@pytest.mark.parametrize("given_parts", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_first_and_second_derivatives(ranks: Ranks, size: int, given_parts: bool) -> None:
    ranks(size).run(_layers, size, given_parts)


class Attention(nn.Module):
    """Whose code needs the length of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, 3)
        query, key, value = (one(x).view(shape).transpose(1, 2) for one in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape))


class Layers(nn.Module):
    """Attention and feed-forward in turn."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.rand(WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.blocks = nn.ModuleList(Block("") for _ in range(2))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.first
        for norm, attention, block in zip(self.norms, self.attention, self.blocks, strict=True):
            h = h + attention(norm(h))
            h = block(h) if self.recompute is None else checkpoint(block, h, use_reentrant=self.recompute)
        return h


def _kept(size: int) -> list[tuple[str, int]]:
    """Lengths of what the layers keep, by the attention's or the feed-forward's."""
    original, cut = pair(Layers, size)
    same(original, cut, [8, 7, 9], together=True)
    assert {path for one in plan_of(cut).sequence_gathers for path in one.again} == {
        *(f"attention.{layer}.{name}" for layer in range(2) for name in ("query", "key", "value")),
        *(f"blocks.{layer}.up" for layer in range(2)),
    }
    original.zero_grad()
    same(original, copy.deepcopy(cut), [6])
    result = cut(torch.randn(2, 9, WIDTH, dtype=torch.float64))
    found, waiting = [], [result.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [one for one, _ in node.next_functions]
        if node.name() == "_ProductsBackward":
            found.append((f"{node.read.given.label}", node.saved_tensors[0].shape[1]))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_parts_are_kept(ranks: Ranks, size: int) -> None:
    for rank, found in enumerate(ranks(size).run(_kept, size)):
        assert sorted(found) == sorted(
            (f"gather {name}.{layer}{end}", [[5, 4], [3, 3, 3]][size - 2][rank])
            for layer in range(2)
            for name, end in (("attention", ""), ("blocks", ".up"))
        )


def _verified(size: int, frozen: bool, recompute: bool | None) -> Report:
    torch.manual_seed(1)
    model = Layers(recompute)
    if frozen:
        for block in model.blocks:
            block.get_parameter("up.weight").requires_grad_(False)
    examples = {"training": Example((), {"x": torch.randn(2, 8, WIDTH)})}
    return verify_on_ranks(model, examples, worker_mesh(size), sequence=True)


@pytest.mark.parametrize(
    ("frozen", "recompute"), [(False, None), (True, None), (False, False), (False, True)]
)
def test_collectives_as_predicted(ranks: Ranks, frozen: bool, recompute: bool | None) -> None:
    report = ranks(2).run(_verified, 2, frozen, recompute)[0]
    report.raise_if_different()
    prediction = report.plan.prediction
    assert prediction is not None
    again = [one.count for one in prediction.collectives if one.label.startswith("again ")]
    # not for weights that are frozen, nor where activations are recomputed
    assert sum(again) == (2 if frozen or recompute is not None else 4)


def _falling_back(size: int) -> None:
    """Where layers are no plain ones each keeps the whole."""
    original, cut = pair(Layers, size)
    for model in (original, cut):
        query = model.get_submodule("attention.0.query")
        query.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
        up = model.get_submodule("blocks.0.up")
        up.register_forward_pre_hook(lambda module, given: None)
    same(original, cut, [8, 7])
    colrow.reset_comm_stats()
    cut(torch.randn(2, 8, WIDTH, dtype=torch.float64)).sum().backward()
    assert colrow.comm_stats().where(operation="all_gather", phase="backward").count == 4 + 1 + 2


def test_layers_with_hooks_keep_the_whole(ranks: Ranks) -> None:
    ranks(2).run(_falling_back, 2)


class Sharing(Layers):
    """A layer beside the others reads what a feed-forward block reads, and all of it."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        y = self.norms[0](h)
        return h + self.blocks[0].get_submodule("down")(
            self.blocks[0].get_submodule("up")(y).tanh() * y.sum()
        )


def test_layers_that_are_not_all_that_reads_a_value_keep_the_whole() -> None:
    examples = {"training": Example((), {"x": torch.randn(2, 8, WIDTH)})}
    for model, expected in ((Layers(), True), (Sharing(), False)):
        plan = derive_plan(model, examples, 2, sequence=True)
        again = {path for one in plan.sequence_gathers for path in one.again}
        assert ("blocks.0.up" in again) == expected
        assert "attention.1.key" in again
        assert "part kept for backward" in plan.explain()


def _compiled(size: int) -> None:
    original, cut = pair(Layers, size)
    cut.compile(backend="aot_eager")
    same(original, cut, [8, 7])


def test_compiled(ranks: Ranks) -> None:
    ranks(2).run(_compiled, 2, timeout=120)
