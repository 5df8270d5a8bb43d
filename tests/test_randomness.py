"""Dropout: alike on replicated values, different on shards, replayed by checkpointing, resumable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import colrow
from colrow.plan import GPT2, AxisSpec, HandPlan, column, row
from tests.apply.comparison import assemble
from tests.pool import Pool, worker_mesh


class Block(nn.Module):
    """Dropout inside a region (on the hidden features) and outside (on the result); keeps its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)
        self.inside: list[Tensor] = []
        self.outside: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        mask = F.dropout(torch.ones_like(hidden), 0.5, self.training)
        self.inside.append(mask.detach().clone())
        out = self.down(hidden * mask)
        mask = F.dropout(torch.ones_like(out), 0.5, self.training)
        self.outside.append(mask.detach().clone())
        return x + out * mask


class Stack(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


PLAN = HandPlan(
    axes={"hidden": AxisSpec()}, styles={"blocks.*.up": column("hidden"), "blocks.*.down": row("hidden")}
)


def _stack(size: int, checkpointed: bool = False) -> nn.Module:
    torch.manual_seed(3)
    model = Stack(checkpointed).double()
    return colrow.parallelize(model, worker_mesh(size), PLAN)


def _masks(size: int) -> dict[str, Any]:
    model = _stack(size)
    colrow.manual_seed(1, worker_mesh(size))
    x = torch.randn(5, 8, dtype=torch.float64)
    model(x)
    model(x)
    blocks: Any = model.blocks
    return {
        "inside": [mask for block in blocks for mask in block.inside],
        "outside": [mask for block in blocks for mask in block.outside],
        "next": torch.rand(3),
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_masks(ranks: Callable[[int], Pool], size: int) -> None:
    results = ranks(size).run(_masks, size)
    first = results[0]
    everything = first["inside"] + first["outside"]
    assert all(0.1 < (mask == 0).double().mean() < 0.9 for mask in everything)
    for result in results[1:]:
        # outside alike, and the common stream goes on alike
        assert all(torch.equal(a, b) for a, b in zip(first["outside"], result["outside"], strict=True))
        assert torch.equal(first["next"], result["next"])
        width = min(result["inside"][0].shape[1], first["inside"][0].shape[1])
        for a, b in zip(first["inside"], result["inside"], strict=True):
            assert not torch.equal(a[:, :width], b[:, :width])
    # no mask is drawn twice on one rank: not by another layer, not by another step
    for masks in (first["inside"], first["outside"]):
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)


def _outside_masks_of(size: int) -> list[Tensor]:
    return _masks(size)["outside"]  # type: ignore[no-any-return]


def test_common_masks_do_not_depend_on_the_degree(ranks: Callable[[int], Pool]) -> None:
    one, three = ranks(1).run(_outside_masks_of, 1)[0], ranks(3).run(_outside_masks_of, 3)[0]
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def _gradients(size: int, checkpointed: bool) -> tuple[dict[str, Tensor], Tensor]:
    model = _stack(size, checkpointed)
    colrow.manual_seed(1, worker_mesh(size))
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    model(x).pow(2).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # a second step: the first must not have left the streams elsewhere
    model(x).pow(2).sum().backward()
    return {name: gradient.clone() for name, gradient in gradients.items()}, torch.rand(4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_checkpointing_replays_masks(ranks: Callable[[int], Pool], size: int) -> None:
    plain, checkpointed = (ranks(size).run(_gradients, size, flag) for flag in (False, True))
    for (expected, drawn), (found, also_drawn) in zip(plain, checkpointed, strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert torch.equal(drawn, also_drawn)


class Part(Block):
    """Only the first half of the region is recomputed: the recomputation ends inside the region."""

    checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self._half, x, use_reentrant=False) if self.checkpointed else self._half(x)
        return x + self.down(F.dropout(hidden, 0.5, self.training))

    def _half(self, x: Tensor) -> Tensor:
        return F.dropout(self.up(x), 0.5, self.training).sin()


def _left_inside(checkpointed: bool) -> list[Tensor]:
    torch.manual_seed(3)
    model = Stack()
    model.blocks = nn.ModuleList([Part() for _ in range(3)])
    for block in model.blocks:
        block.checkpointed = checkpointed  # type: ignore[assignment]
    colrow.parallelize(model.double(), worker_mesh(2), PLAN)
    colrow.manual_seed(1, worker_mesh(2))
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        model(x).pow(2).sum().backward()
    drawn = torch.rand(4, dtype=torch.float64)
    # the common stream is where it should be on every rank
    assert torch.equal(colrow.state_of(model).communicator.all_reduce(drawn), 2 * drawn)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None] + [drawn]


def test_recomputation_that_ends_inside_a_region(ranks: Callable[[int], Pool]) -> None:
    plain, checkpointed = (ranks(2).run(_left_inside, flag) for flag in (False, True))
    for expected, found in zip(plain, checkpointed, strict=True):
        assert len(expected) == 13
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def _draw_alike(model: nn.Module) -> None:
    drawn = torch.rand(4)
    assert torch.equal(colrow.state_of(model).communicator.all_reduce(drawn), 2 * drawn)


def _interrupted() -> None:
    """An exception inside a region leaves the common stream where it was; so does a layer called alone."""
    model = _stack(2)
    colrow.manual_seed(1, worker_mesh(2))
    x = torch.randn(5, 8, dtype=torch.float64)
    block: Any = model.blocks[1]  # type: ignore[index]
    handle = block.down.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    _draw_alike(model)
    handle.remove()
    model(x)
    _draw_alike(model)
    block.up(x)
    _draw_alike(model)
    # a block called by itself has its region all the same
    block.inside.clear()
    block(x)
    total = colrow.state_of(model).communicator.all_reduce(block.inside[0])
    assert not torch.equal(total, 2 * block.inside[0])
    _draw_alike(model)
    # dropout that is active although the model is in evaluation
    model.eval()
    block.training = True
    block.inside.clear()
    model(x)
    total = colrow.state_of(model).communicator.all_reduce(block.inside[0])
    assert not torch.equal(total, 2 * block.inside[0])
    _draw_alike(model)


class Attention(nn.Module):
    """Two layers read the input; a part that begins with the second of them is recomputed."""

    def __init__(self, checkpointed: str) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        def part(name: str, layer: nn.Module) -> Tensor:
            def drop(x: Tensor) -> Tensor:
                return F.dropout(layer(x), 0.5).sin()

            return checkpoint(drop, x, use_reentrant=False) if name in self.checkpointed else drop(x)

        hidden = part("q", self.q) * part("k", self.k)

        def end(hidden: Tensor) -> Tensor:
            return F.dropout(self.out(F.dropout(hidden, 0.5)), 0.5).sin()

        result = checkpoint(end, hidden, use_reentrant=False) if "out" in self.checkpointed else end(hidden)
        return x + result  # type: ignore[no-any-return]


ATTENTION = HandPlan(axes={"heads": AxisSpec(3)}, styles={"{q,k}": column("heads"), "out": row("heads")})


def _parts(checkpointed: str) -> list[Tensor]:
    torch.manual_seed(3)
    model = colrow.parallelize(Attention(checkpointed).double(), worker_mesh(2), ATTENTION)
    colrow.manual_seed(1, worker_mesh(2))
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        model(x).pow(2).sum().backward()
    _draw_alike(model)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("checkpointed", ["q", "k", "qk"])
def test_parts_of_regions_are_replayed(ranks: Callable[[int], Pool], checkpointed: str) -> None:
    for expected, found in zip(ranks(2).run(_parts, ""), ranks(2).run(_parts, checkpointed), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def _cannot_be_replayed() -> None:
    with pytest.raises(RuntimeError, match="begins inside the region of q and ends outside"):
        _parts("out")


def test_what_cannot_be_replayed_is_refused(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_cannot_be_replayed)


class Interleaved(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.q, self.o, self.up, self.down = (
            nn.Linear(8, 9),
            nn.Linear(9, 8),
            nn.Linear(8, 12),
            nn.Linear(12, 8),
        )
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, up = self.q(x), self.up(x)
        attention = self.o(F.dropout(q, 0.5))
        result: Tensor = attention + self.down(F.dropout(up, self.dropout, self.dropout > 0))
        return result


def _interleaved() -> None:
    plan = HandPlan(
        axes={"heads": AxisSpec(), "mlp": AxisSpec()},
        styles={"q": column("heads"), "o": row("heads"), "up": column("mlp"), "down": row("mlp")},
    )
    x = torch.randn(5, 8)
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        model = colrow.parallelize(Interleaved(dropout), worker_mesh(2), plan)
        colrow.manual_seed(1, worker_mesh(2))
        if dropout:
            with pytest.raises(RuntimeError, match="overlaps another"):
                model(x)
        else:
            model(x)
        _draw_alike(model)


def test_overlapping_regions(ranks: Callable[[int], Pool]) -> None:
    """Which mask should be common cannot be told there: an error, unless nothing is drawn."""
    ranks(2).run(_interleaved)


def test_an_exception_inside_a_region(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_interrupted)


def _gpt2(size: int) -> list[float]:
    """A real model with every dropout on: replicas stay replicas, and no step repeats another."""
    mesh = worker_mesh(size)
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=61, n_embd=20, n_layer=2, n_head=5, n_positions=16, attn_implementation="eager"
    )
    model = GPT2LMHeadModel(config).double().train()
    colrow.parallelize(model, mesh, GPT2)
    colrow.manual_seed(7, mesh)
    ids = torch.randint(61, (2, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        assemble(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    assemble(model, dict(model.named_parameters()))  # replicas are compared bit for bit
    return losses


@pytest.mark.parametrize("size", [2, 3])
def test_gpt2_with_dropout(ranks: Callable[[int], Pool], size: int) -> None:
    results = ranks(size).run(_gpt2, size)
    assert all(losses == results[0] for losses in results)
    assert len(set(results[0])) == 3


def _replayed() -> None:
    model = _stack(2)
    mesh = worker_mesh(2)
    colrow.manual_seed(7, mesh)
    x = torch.randn(5, 8, dtype=torch.float64)
    model(x)
    state = torch.get_rng_state()  # all that needs saving
    expected = [model(x), model(x)]
    torch.manual_seed(999)
    model(x)
    torch.set_rng_state(state)
    assert all(torch.equal(model(x), one) for one in expected)
    model.eval()
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), before)  # evaluation draws nothing


def test_saved_state_replays(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_replayed)


def _seeds() -> list[float]:
    mesh = worker_mesh(tp=2, dp=2)
    colrow.manual_seed(5, mesh["tp"])  # a part of the mesh knows the whole
    return [torch.rand(1).item(), mesh.get_local_rank("dp"), mesh.get_local_rank("tp")]


def test_replicas_draw_differently(ranks: Callable[[int], Pool]) -> None:
    """Alike within a tensor-parallel group, different between data-parallel replicas."""
    drawn = {(dp, tp): value for value, dp, tp in ranks(4).run(_seeds)}
    assert drawn[0, 0] == drawn[0, 1]
    assert drawn[1, 0] == drawn[1, 1]
    assert drawn[0, 0] != drawn[1, 0]


def _drawn(sizes: dict[str, int]) -> Tensor:
    colrow.manual_seed(1, worker_mesh(**{"tp": 1, **sizes}))
    return torch.rand(8)


@pytest.mark.parametrize("other", ["dp", "pp", "ep", "cp"])
def test_alike_within_a_tensor_parallel_group_only(ranks: Callable[[int], Pool], other: str) -> None:
    first, also_first, second, also_second = ranks(4).run(_drawn, {"tp": 2, other: 2})
    assert torch.equal(first, torch.rand(8, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(first, also_first)
    assert torch.equal(second, also_second)
    assert not torch.equal(first, second)
