"""Which modules hold experts follows from what they compute; what cannot be divided is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.parallel.experts.find import Argument, Experts, find_experts
from colrow.trace import Example
from tests.parallel.experts.models import Given, OwnExperts
from tests.parallel.experts.test_dispatch import ALL, alike, drawn
from tests.pool import Pool, worker_mesh


def _found(model: nn.Module, choices: int = 2) -> tuple[Experts, ...]:
    x, index, weights = drawn(0, 4, choices, range(4))
    return find_experts(model, {"evaluation": Example((x, index, weights))})


def _with(experts: nn.Module) -> nn.Module:
    model = Given(4)
    model.experts = experts
    return model


def test_arguments_in_any_order() -> None:
    (found,) = _found(Given(4))
    assert found.path == "experts"
    assert (found.count, found.attributes) == (4, ())
    assert found.index == Argument(0, "index")
    assert found.tokens == Argument(1, "x")
    assert found.weights == Argument(None, "weights")


class Counting(OwnExperts):
    """Asks how many experts there are; as many as a token has in another dimension."""

    def __init__(self) -> None:
        super().__init__(4, 6, 4)
        self.number, self.hidden = 4, 4

    def forward(self, index: Tensor, x: Tensor, *, weights: Tensor) -> Tensor:
        chosen = torch.nn.functional.one_hot(index, self.number).to(weights.dtype) * weights[..., None]
        hidden = torch.einsum("eih,th->tei", self.up, x).view(len(x), -1, self.hidden).tanh()
        return torch.einsum("ehi,tei,tke->th", self.down, hidden, chosen)


def test_numbers_of_experts_become_local() -> None:
    (found,) = _found(_with(Counting()))
    assert found.attributes == ("number",)


class Normalised(OwnExperts):
    def forward(self, index: Tensor, x: Tensor, *, weights: Tensor) -> Tensor:
        return super().forward(index, x, weights=weights / weights.sum(1, keepdim=True))


class Together(OwnExperts):
    def forward(self, index: Tensor, x: Tensor, *, weights: Tensor) -> Tensor:
        return super().forward(index, x - x.mean(0), weights=weights)


class Related(OwnExperts):
    def forward(self, index: Tensor, x: Tensor, *, weights: Tensor) -> Tensor:
        return super().forward(index, x + self.up.mean(), weights=weights)


class Unchosen(OwnExperts):
    def forward(self, index: Tensor, x: Tensor, *, weights: Tensor) -> Tensor:
        return super().forward(index * 0, x, weights=weights)


class Listed(nn.Module):
    """Experts that are modules of their own, called where tokens chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(4))

    def forward(self, index: Tensor, x: Tensor, *, weights: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.each):
            result = result + expert(x) * (weights * (index == number)).sum(1, keepdim=True)
        return result


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Normalised, "experts: its result is not the sum over each token's choices"),
        (Together, "experts: its result for a token depends on the other tokens"),
        (Related, "experts: some of its experts alone do not compute what they do among all"),
        (Unchosen, "experts: its result does not depend on the choices"),
    ],
)
def test_what_experts_do_not_do(kind: Callable[[int, int, int], nn.Module], reason: str) -> None:
    with pytest.raises(colrow.PlanError, match=reason) as raised:
        _found(_with(kind(4, 6, 4)))
    assert "Make the mesh without ep" in str(raised.value)


def test_no_stacked_weights() -> None:
    with pytest.raises(colrow.PlanError, match="no module was found whose experts could be divided"):
        _found(_with(Listed()))


def _refused() -> None:
    mesh = worker_mesh(tp=1, ep=2)
    example = drawn(0, 4, 1, range(1))
    plan = colrow.derive_plan(Given(4), {"evaluation": Example(example)}, 1)
    with pytest.raises(ValueError, match="besides a plan give an example of a call"):
        colrow.parallelize(Given(4), mesh, plan)
    with pytest.raises(colrow.PlanError, match="it has 1 expert: there is nothing to divide"):
        colrow.parallelize(Given(1), mesh, example)
    different = Given(4)
    with torch.no_grad():
        different.experts.up += mesh.get_local_rank("ep")
    with pytest.raises(colrow.PlanError, match=r"experts\.up: the ranks hold different weights"):
        colrow.parallelize(different, mesh, drawn(0, 4, 2, range(4)))
    model = colrow.parallelize(Given(4), mesh, plan, check=example)
    with pytest.raises(ValueError, match="a token chose expert 4, but only 4 have weights"):
        model(*drawn(0, 4, 2, range(3, 5)))
    with pytest.raises(ValueError, match="name the model too"):
        colrow.zero_redundancy_optimizer(model.parameters(), torch.optim.SGD, mesh, lr=0.1)


def test_refused(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_refused)


def _too_many_ranks() -> None:
    with pytest.raises(colrow.PlanError, match="it has 2 experts for 3 ranks of ep"):
        colrow.parallelize(Given(2), worker_mesh(tp=1, ep=3), drawn(0, 4, 2, range(2)))


def test_more_ranks_than_experts(ranks: Callable[[int], Pool]) -> None:
    ranks(3).run(_too_many_ranks)


def _within_tensor_parallel() -> None:
    mesh = worker_mesh(tp=2, ep=2)
    alike(mesh, partial(Given, 5), [drawn(seed, 5, 2, ALL) for seed in range(2)])
    example = drawn(0, 4, 2, ALL)
    plan = colrow.derive_plan(Given(5), {"evaluation": Example(example)}, 2)
    sharding = plan.parameters["experts.up"]
    twice = replace(plan, parameters={"experts.up": replace(sharding, dimension=0)})
    with pytest.raises(colrow.PlanError, match="experts: the plan cuts experts over tp"):
        colrow.parallelize(Given(5), mesh, twice, check=example)


def test_tensor_parallelism_leaves_experts_whole(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_within_tensor_parallel)
