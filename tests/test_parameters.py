"""Norms and clipping against torch's own on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow import parameters
from colrow.plan import AxisSpec, HandPlan, column, row
from colrow.state import placed_parameters
from tests.pool import Pool, worker_mesh

PLAN = HandPlan(axes={"hidden": AxisSpec()}, styles={"0": column("hidden"), "2": row("hidden")})


def _models(size: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)).to(dtype)
    torch.manual_seed(0)
    cut = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)).to(dtype)
    colrow.parallelize(cut, worker_mesh(size), PLAN)
    x = torch.randn(5, 4).to(dtype)
    for model in (whole, cut):
        (model(x) ** 2).sum().backward()
    return whole, cut


def _norms(size: int) -> None:
    for norm_type in (2.0, 1.0, 3.0, float("inf")):
        for largest in (1e-2, 1e6, float("inf")):
            whole, cut = _models(size, torch.float64)
            expected = nn.utils.clip_grad_norm_(whole.parameters(), largest, norm_type)
            colrow.reset_comm_stats()
            found = colrow.clip_grad_norm_(cut, largest, norm_type)
            assert colrow.comm_stats().count == (size > 1)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
            by_name = dict(whole.named_parameters())
            rank = colrow.state_of(cut).communicator.rank
            for placed in placed_parameters(cut):
                assert placed.parameter.grad is not None
                gradient = by_name[placed.name].grad
                assert gradient is not None
                torch.testing.assert_close(
                    placed.parameter.grad, placed.layout.slice(gradient, rank), rtol=1e-12, atol=1e-15
                )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_norms_and_clipping(ranks: Callable[[int], Pool], size: int) -> None:
    """With 3 hidden features over 4 ranks, one rank holds none."""
    ranks(size).run(_norms, size)


def _rounded_otherwise(norm_type: float) -> float:
    """Rank 1 sums what all ranks hold to another last bit, as at another place in memory it may."""
    _, cut = _models(2, torch.float64)
    exact = parameters._power_sum
    rank = colrow.state_of(cut).communicator.rank
    unlike = torch.tensor(1.0 + rank * 2.0**-52, dtype=torch.float64)

    def rounded(gradients: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
        return exact(gradients, norm_type, device) * unlike

    with patch.object(parameters, "_power_sum", rounded):
        return colrow.clip_grad_norm_(cut, 1e-2, norm_type).item()


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_one_norm_on_all_ranks(ranks: Callable[[int], Pool], norm_type: float) -> None:
    """Scaled by different numbers, replicated parameters would part, bit by bit."""
    first, second = ranks(2).run(_rounded_otherwise, norm_type)
    assert first == second


def _payload() -> list[tuple[int, int]]:
    moved = []
    for blocks in (1, 12):
        layers = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(blocks)]
        model = nn.Sequential(*layers)
        colrow.parallelize(model, worker_mesh(2), (torch.randn(5, 4),))
        model(torch.ones(5, 4)).sum().backward()
        colrow.reset_comm_stats()
        colrow.clip_grad_norm_(model, 1.0)
        moved.append((colrow.comm_stats().count, colrow.comm_stats().bytes))
    return moved


def test_one_reduction_of_a_few_numbers_for_any_number_of_parameters(ranks: Callable[[int], Pool]) -> None:
    assert ranks(2).run(_payload) == [[(1, 32), (1, 32)]] * 2


def _special() -> None:
    _, cut = _models(2, torch.bfloat16)
    assert colrow.global_grad_norm(cut).dtype == torch.float64
    parameters = list(cut.parameters())
    if colrow.state_of(cut).communicator.rank == 1:
        parameters[0].grad[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(RuntimeError, match="norm is nan"):
        colrow.clip_grad_norm_(cut, 1.0, error_if_nonfinite=True)
    assert colrow.global_grad_norm(cut, float("inf")).isnan()  # transports may lose it in a maximum
    for parameter in parameters:
        parameter.grad = None
    assert colrow.clip_grad_norm_(cut, 1.0).item() == 0.0


def test_half_precision_nan_and_no_gradients(ranks: Callable[[int], Pool]) -> None:
    """Not a number on one rank is so on all: no rank goes on alone."""
    ranks(2).run(_special)


def _different_ways() -> None:
    """A hook on one rank makes it enter a value twice: the ranks' reductions no longer belong together."""
    _, cut = _models(2, torch.float64)
    ranks = colrow.state_of(cut).communicator
    colrow.global_grad_norm(cut)
    ranks.all_reduce(torch.ones(2), label=f"only rank {ranks.rank} calls it so")
    with pytest.raises(RuntimeError, match="have not gone through the same collectives"):
        colrow.clip_grad_norm_(cut, 1.0)


def test_ranks_that_go_different_ways(ranks: Callable[[int], Pool]) -> None:
    pool = ranks(2)
    pool.run(_different_ways)
    pool.close()  # its ranks' sequences differ from here on


def _replicas() -> None:
    _, cut = _models(2, torch.float32)
    colrow.check_replicas(cut)
    rank = colrow.state_of(cut).communicator.rank
    # torch's own clipping sees one rank's part only
    nn.utils.clip_grad_norm_(cut.parameters(), 1e-3)
    with pytest.raises(colrow.PlanError, match=r"the gradient of 2\.bias: it is replicated, but differs"):
        colrow.check_replicas(cut)
    cut.zero_grad()
    colrow.check_replicas(cut)
    bias = cut.get_parameter("2.bias")
    with torch.no_grad():
        bias[rank], bias[1 - rank] = 1.0, 2.0  # a permutation
    with pytest.raises(colrow.PlanError, match=r"2\.bias: it is replicated, but differs"):
        colrow.check_replicas(cut)


def test_replicas_are_compared_to_the_bit(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_replicas)


def _threads() -> None:
    """Equal weights are equal whatever the number of threads that sum them up."""
    mesh = worker_mesh(2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 900), nn.Tanh(), nn.Linear(900, 700))
    torch.set_num_threads(1 + torch.distributed.get_rank())
    try:
        colrow.parallelize(model, mesh, PLAN)
    finally:
        torch.set_num_threads(1)


def test_weights_are_compared_whatever_the_threads(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_threads)
