"""Where parts of a sequence begin and end: modules that are called more than once, or not always."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.peers.shapes import Shape
from benchmarks.peers.systems.models import Gpt
from torch import Tensor, nn

from colrow.plan import ModuleOutput, Plan
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.derive.sequences import WIDTH, Block, Mixing, Stack, pair, plan_of
from tests.pool import Pool, worker_mesh

Ranks = Callable[[int], Pool]


def _verified(build: type[nn.Module], size: int) -> Report:
    torch.manual_seed(1)
    examples = {"training": Example((), {"x": torch.randn(2, 8, WIDTH)})}
    return verify_on_ranks(build(), examples, worker_mesh(size), sequence=True)


class Shared(Stack):
    """One dropout, before the layers, where values are whole, and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x * self.first)
        for mixing, block in zip(self.mixing, self.blocks, strict=True):
            h = block(h + mixing(h))
        return self.drop(self.last(h))


def test_random_numbers_for_wholes_and_for_parts(ranks: Ranks) -> None:
    report = ranks(2).run(_verified, Shared, 2)[0]
    report.raise_if_different()
    assert isinstance(report.plan, Plan)
    assert all(one.along is not None for one in report.plan.exits)
    # random numbers agree where a value is whole
    assert "drop" not in {one.module for one in report.plan.randomness}


class Repeated(nn.Module):
    """A stack whose norm is called with parts twice; the whole is needed after the second call."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.blocks = Mixing(1), nn.ModuleList(Block("") for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.mixing(x))
        h = self.norm(self.blocks[1](self.blocks[0](h)))
        return h.cumsum(1)


def test_the_whole_of_one_call_only(ranks: Ranks) -> None:
    report = ranks(2).run(_verified, Repeated, 2)[0]
    report.raise_if_different()
    assert isinstance(report.plan, Plan)
    assert all(one.along is not None for one in report.plan.exits)
    assert ModuleOutput("norm") not in {
        one for gather in report.plan.sequence_gathers for one in gather.places
    }


class Remembering(Stack):
    """Two blocks read the first value beside the latest."""

    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block("")

        def forward(self, first: Tensor, h: Tensor) -> Tensor:
            return self.block(first * 2 + h)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Adding() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = h = (x * self.first).cumsum(1)
        for mixing, block in zip(self.mixing, self.blocks, strict=True):
            h = block(first, h + mixing(h))
        return self.last(h) + first


def test_parts_taken_in_several_places(ranks: Ranks) -> None:
    ranks(2).run(_verified, Remembering, 2)[0].raise_if_different()


class Normed(Stack):
    """Norms by hand, whose results are measured: what a weight is multiplied with is whole there."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = Normed.Norm(), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            batch, length, _ = y.shape
            return x + self.down(torch.tanh(self.up(y).view(batch, length, -1)).cumsum(1))

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(self.Branch() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.first
        for block, branch in zip(self.blocks, self.branches, strict=True):
            h = branch(block(h))
        return self.last(h)


def test_the_weight_of_a_norm_that_gives_the_whole(ranks: Ranks) -> None:
    """Its gradient is not a partial sum: the gather's own is, where nothing else is read."""
    report = ranks(2).run(_verified, Normed, 2)[0]
    report.raise_if_different()
    assert isinstance(report.plan, Plan)
    assert report.plan.sequence_gathers


class Dropping(Stack):
    """Leaves out layers by chance: a trace shows one course of several."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.first
        for mixing, block in zip(self.mixing, self.blocks, strict=True):
            if torch.rand([]) < 0.4:
                continue
            h = block(h + mixing(h))
        return self.last(h)


def _dropped(size: int) -> Plan:
    original, cut = pair(lambda: Dropping(depth=3), size)
    for seed in range(8):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        x, cotangent = (torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
        results = []
        for model in (original, cut):
            torch.set_rng_state(state)
            results.append(model(x))
            results[-1].backward(cotangent)
        assert (results[0] - results[1]).abs().max() < 1e-11
    return plan_of(cut)


def test_layers_left_out_by_chance(ranks: Ranks) -> None:
    plan = ranks(2).run(_dropped, 2)[0]
    # none is left out of the trace, and parts do not leave a layer, as the next one may not be called
    assert len(plan.exits) == 6
    assert any(one.along is not None for one in plan.exits)


def _gpt() -> nn.Module:
    """Positions are a parameter that is added, and what is returned is an object of the program's own."""
    model = Gpt(Shape("small", "gpt", 2, 24, 3, 3, 40, 50, 10, 2, 1))
    nn.init.normal_(model.positions)
    return model


def _verify_gpt(size: int, ids: Tensor) -> Report:
    example = {"input_ids": ids, "labels": ids}
    return verify_on_ranks(_gpt, example, worker_mesh(size), steps=1, sequence=True)


@pytest.mark.parametrize("size", [2, 3])
def test_positions_in_a_parameter(ranks: Ranks, size: int) -> None:
    for report in ranks(size).run(_verify_gpt, size, torch.randint(50, (2, 10))):
        assert report.passed, str(report)
        compared = {check.name for check in report.checks if check.kind == "outputs"}
        assert {"logits", "loss"} <= compared
