"""Ranks that are not told the same are refused, or found, before they train different models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow import parameters
from colrow.parallel.data import Kind
from tests.parallel.pipeline.models import VOCABULARY, WithSkips, batch_of, build, example_of
from tests.parallel.pipeline.training import make
from tests.pool import Pool, worker_mesh


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


def _replicas(kind: Kind = "ddp") -> tuple[nn.Module, Any, int]:
    mesh = worker_mesh(tp=1, dp=2)
    model = colrow.parallelize(_model(), mesh, (torch.rand(3, 4),))
    return colrow.data_parallel(model, mesh, kind), mesh, mesh.get_local_rank("dp")


def _other_rates() -> None:
    model, _, rank = _replicas()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + rank))
    colrow.check_replicas(model)
    model(torch.rand(3, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(colrow.PlanError, match=r"0\.weight: it differs between the replicas that train it"):
        colrow.check_replicas(model)


def test_replicas_that_drift_apart(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_other_rates)


def _norm_rounded_otherwise() -> float:
    """Replica 1 sums equal gradients to another last bit, as with another number of threads it may."""
    model, _, rank = _replicas()
    model(torch.rand(3, 4)).sum().backward()
    exact = parameters._power_sum

    def rounded(gradients: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
        return exact(gradients, norm_type, device) * torch.tensor(1.0 + rank * 2.0**-40, dtype=torch.float64)

    with patch.object(parameters, "_power_sum", rounded):
        return colrow.clip_grad_norm_(model, 1e-2).item()


def test_replicas_clip_alike(ranks: Callable[[int], Pool]) -> None:
    first, second = ranks(2).run(_norm_rounded_otherwise)
    assert first == second


def _other_optimizers() -> None:
    model, mesh, rank = _replicas()
    own = list(model.parameters())
    turned = [own[0], own[1], *own[:1:-1]]  # other ones of the same shapes
    groups = [{"params": own[:2], "weight_decay": 0.1 * rank}, {"params": own[2:]}]
    calls: list[tuple[Any, dict[str, Any]]] = [
        (turned if rank else own, {"lr": 0.1}),
        (own[rank:], {"lr": 0.1}),
        (own, {"lr": 0.1 * (1 + rank)}),
        (groups, {"lr": 0.1}),
    ]
    for given, options in calls:
        with pytest.raises(ValueError, match="the replicas' optimizers differ"):
            colrow.zero_redundancy_optimizer(given, torch.optim.SGD, mesh, **options)
    colrow.zero_redundancy_optimizer(own, torch.optim.SGD, mesh, lr=0.1, weight_decay=0.1)


def test_optimizers_that_would_mix_up_parameters(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_other_optimizers)


def _frozen_on_one_rank() -> None:
    mesh = worker_mesh(tp=2)
    model = _model()
    model.get_parameter("2.weight").requires_grad_(mesh.get_local_rank("tp") == 0)
    with pytest.raises(colrow.PlanError, match=r"2\.weight: some ranks train it, and on others it is frozen"):
        colrow.parallelize(model, mesh, (torch.rand(3, 4),))
    mesh = worker_mesh(tp=1, dp=2)
    replica = colrow.parallelize(_model(), mesh, (torch.rand(3, 4),))
    replica.get_parameter("2.weight").requires_grad_(mesh.get_local_rank("dp") == 0)
    with pytest.raises(colrow.PlanError, match=r"2\.weight: some ranks train it, and on others it is frozen"):
        colrow.data_parallel(replica, mesh, "fsdp")


def test_frozen_on_one_rank(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_frozen_on_one_rank)


def _other_batches() -> None:
    mesh = worker_mesh(tp=1, pp=2)
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (4, 5))
    batch = {"ids": ids, "labels": ids}
    pipeline = colrow.pipeline_parallel(WithSkips(), mesh, batch, schedule="1f1b", micro_batches=2)
    is_last = mesh.get_local_rank("pp") == 1
    other = {"ids": ids, "labels": ids.flip(0)} if is_last else batch
    with pytest.raises(ValueError, match="given different batches or weights"):
        pipeline.step(other)
    with pytest.raises(ValueError, match="given different batches or weights"), torch.no_grad():
        pipeline(**other)
    with pytest.raises(ValueError, match="given different batches or weights"):
        pipeline.step(batch, 2.0 if is_last else 1.0)
    pipeline.train(is_last)
    with pytest.raises(ValueError, match="are not all training"):
        pipeline.step(batch)
    pipeline.train()
    assert all(one.grad is None for one in pipeline.parameters())
    pipeline.step(batch)  # nothing was left behind


def test_stages_with_other_batches(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_other_batches)


def _without_averages(dimension: str) -> str:
    mesh = worker_mesh(tp=1, **{dimension: 2})
    rank = mesh.get_local_rank(dimension)
    model = colrow.parallelize(_model(), mesh, (torch.rand(3, 4),)) if dimension == "dp" else _sequences(mesh)
    colrow.check_replicas(model)
    with torch.no_grad():
        next(model.parameters()).add_(rank)  # a step without colrow.data_parallel
    with pytest.raises(colrow.PlanError) as raised:
        colrow.check_replicas(model)
    return str(raised.value)


def _sequences(mesh: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build("llama")
    return colrow.parallelize(model, mesh, example_of("llama"))


@pytest.mark.parametrize("dimension", ["dp", "cp"])
def test_replicas_that_nothing_averages(ranks: Callable[[int], Pool], dimension: str) -> None:
    assert (
        "Train what colrow.data_parallel(model, mesh) returns"
        in ranks(2).run(_without_averages, dimension)[0]
    )


def _in_inference_mode() -> None:
    model, _, _ = _replicas("fsdp")
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"evaluate it within torch\.no_grad"):
        model(torch.rand(3, 4))
    with torch.no_grad():
        model(torch.rand(3, 4))
    model(torch.rand(3, 4)).sum().backward()


def _stages_in_inference_mode() -> None:
    pipeline = make("llama", {"pp": 2, "dp": 2}, "fsdp", micro_batches=2)
    batch = {key: item[:4] for key, item in batch_of("llama").items()}
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"evaluate it within torch\.no_grad"):
        pipeline(**batch)
    pipeline.step(batch)


def test_fsdp_refuses_inference_mode(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_in_inference_mode)
    ranks(4).run(_stages_in_inference_mode)
