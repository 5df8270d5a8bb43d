"""Any choice of any tokens gives what one process computes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import colrow
from colrow.mesh import coordinate, replicas
from tests.apply.comparison import largest_error
from tests.parallel.experts.models import Given
from tests.parallel.experts.training import whole
from tests.pool import Pool, worker_mesh

FEATURES = 6

Inputs = tuple[Tensor, Tensor, Tensor]


def drawn(seed: int, tokens: int, choices: int, experts: range) -> Inputs:
    """Tokens that choose different ones of some experts at random, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(tokens, FEATURES, **draw)
    order = torch.rand(tokens, len(experts), **draw).argsort(1)[:, :choices]
    return x, torch.tensor(experts)[order], torch.randn(tokens, choices, **draw)


def divided(mesh: DeviceMesh, build: Callable[[], Given]) -> nn.Module:
    model = build()
    count = model.experts.up.shape[0]
    return colrow.data_parallel(colrow.parallelize(model, mesh, drawn(0, 4, 2, range(count))), mesh)


def alike(mesh: DeviceMesh, build: Callable[[], Given], given: list[Inputs], again: bool = False) -> None:
    """What each replica is given, with random cotangents: outputs and all gradients, of inputs too."""
    original, model = build(), divided(mesh, build)
    own, count = replicas(mesh).get_local_rank(), replicas(mesh).size()
    expected: list[tuple[Tensor, ...]] = []
    for replica, (x, index, weights) in enumerate(given):
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        output = original(x, index, weights)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(replica)).double()
        output.backward(cotangent / count)
        assert x.grad is not None
        assert weights.grad is not None
        expected.append((output.detach(), x.grad * count, weights.grad * count, cotangent))
    x, index, weights = given[own]
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    found = checkpoint(model, x, index, weights, use_reentrant=False) if again else model(x, index, weights)
    output, of_x, of_weights, cotangent = expected[own]
    assert largest_error(found.detach(), output) < 1e-12
    found.backward(cotangent)
    assert x.grad is not None
    assert weights.grad is not None
    assert largest_error(x.grad, of_x) < 1e-12
    assert largest_error(weights.grad, of_weights) < 1e-12
    gradients = whole(model, lambda one: torch.zeros_like(one) if one.grad is None else one.grad)
    for name, parameter in original.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert largest_error(gradients[name], wanted) < 1e-12, name
    with torch.no_grad():
        assert torch.equal(model(*given[own]), found.detach())


def _case(ep: int, dp: int, experts: int, tokens: list[int], choices: int, chosen: list[range]) -> None:
    mesh = worker_mesh(tp=1, dp=dp, ep=ep)
    given = [drawn(seed, *pair) for seed, pair in enumerate(zip(tokens, [choices] * 9, chosen, strict=False))]
    alike(mesh, partial(Given, experts), given)
    alike(mesh, partial(Given, experts), given, again=True)


ALL = range(5)


@pytest.mark.parametrize(
    ("ep", "experts", "tokens", "choices", "chosen"),
    [
        pytest.param(2, 5, [7, 3], 2, [ALL, ALL], id="unequal"),
        pytest.param(2, 5, [4, 3], 2, [range(3, 5), range(3)], id="only-the-others"),
        pytest.param(2, 5, [4, 3], 2, [range(3), range(3)], id="one-has-nothing-to-do"),
        pytest.param(3, 5, [4, 0, 5], 3, [ALL, ALL, ALL], id="no-tokens"),
        pytest.param(3, 5, [4, 2, 5], 1, [range(1), range(1), range(1)], id="all-choose-one"),
    ],
)
def test_any_choice(
    ranks: Callable[[int], Pool], ep: int, experts: int, tokens: list[int], choices: int, chosen: list[range]
) -> None:
    ranks(ep).run(_case, ep, 1, experts, tokens, choices, chosen)


def _many(ep: int, dp: int) -> None:
    mesh = worker_mesh(tp=1, dp=dp, ep=ep)
    for seed in range(25):
        draw = torch.Generator().manual_seed(seed)
        experts = int(torch.randint(ep, 9, (), generator=draw)) if ep > 1 else 4
        experts = max(experts, 2)
        some = [sorted(torch.randperm(experts + 1, generator=draw)[:2].tolist()) for _ in range(ep * dp)]
        choices = int(torch.randint(1, 4, (), generator=draw))
        choices = min(choices, *(high - low for low, high in some))
        tokens = torch.randint(0, 9, (ep * dp,), generator=draw).tolist()
        given = [
            drawn(100 * seed + replica, tokens[replica], choices, range(*pair))
            for replica, pair in enumerate(some)
        ]
        alike(mesh, partial(Given, experts), given, again=seed % 3 == 0)


@pytest.mark.slow
@pytest.mark.parametrize(("ep", "dp"), [(2, 1), (3, 1), (2, 2), (4, 1)])
def test_many_choices(ranks: Callable[[int], Pool], ep: int, dp: int) -> None:
    ranks(ep * dp).run(_many, ep, dp)


def _traffic() -> None:
    mesh = worker_mesh(tp=1, ep=2)
    model = divided(mesh, partial(Given, 4))
    own = coordinate(mesh, "ep")
    x = torch.randn(6, FEATURES, dtype=torch.float64, requires_grad=True)
    # three tokens chose two experts of the other rank, three one of each
    index = torch.tensor([[0, 1], [2, 3]])[1 - own].repeat(6, 1)
    index[:3] = torch.tensor([0, 2])
    weights = torch.rand(6, 2, dtype=torch.float64)
    colrow.reset_comm_stats()
    out = model(x, index, weights)
    stats = colrow.comm_stats(mesh["ep"])
    rows = 3 * 2 + 3  # a token travels once to each rank, also if it chose two experts there
    assert stats.where(label="dispatch").bytes == rows * (FEATURES * 8 + 2 * 8 + 2 * 4)
    assert stats.where(label="dispatch").count == 3
    assert stats.where(label="counts").count == stats.where(label="return").count == 1
    assert stats.count == 5
    out.sum().backward()
    assert colrow.comm_stats(mesh["ep"]).where(phase="backward", operation="all_to_all").count == 2

    loads = colrow.expert_loads(model)
    both = torch.bincount(torch.cat([index.flatten(), torch.tensor([[0, 1], [2, 3]])[own].repeat(3)]))
    both += torch.bincount(torch.tensor([0, 2]).repeat(3), minlength=4)
    assert torch.equal(loads["experts"], both)
    colrow.reset_expert_loads(model)
    checkpoint(model, x, index, weights, use_reentrant=False).sum().backward()
    assert int(colrow.expert_loads(model)["experts"].sum()) == 2 * index.numel()  # recomputed ones once


def test_what_travels_and_what_is_counted(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_traffic)


def _back() -> None:
    mesh = worker_mesh(tp=1, ep=2)
    model = colrow.parallelize(Given(5), mesh, drawn(0, 4, 2, ALL))
    assert model.experts.up.shape[0] == (3, 2)[coordinate(mesh, "ep")]
    assert colrow.count_parameters(model).total == sum(one.numel() for one in Given(5).parameters())
    colrow.unshard(model)
    given = drawn(1, 5, 2, ALL)
    assert torch.equal(model(*given), Given(5)(*given))
    assert list(vars(model.experts)) == list(vars(Given(5).experts))


def test_unshard(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_back)
