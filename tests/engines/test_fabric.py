"""Lightning Fabric on a cut model trains as plain PyTorch does in one process that has all data."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import colrow
from tests.engines import in_double
from tests.engines.job import BATCH, largest_difference, numbers_in, run_example, train_plainly, write_job
from tests.pool import Pool, worker_mesh

pytest.importorskip("lightning_fabric")

from colrow.engines.fabric import Fabric, TensorParallelStrategy

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("ranks", "data"), [(2, "ddp"), (4, "ddp"), (4, "fsdp")])
def test_the_example(tmp_path: Path, ranks: int, data: str) -> None:
    model, text = write_job(tmp_path, torch.float64)
    printed = run_example("with_fabric", ranks, model, text, tmp_path / "out", environment={"DATA": data})
    lines = text.read_text().splitlines()
    order: DistributedSampler[str] = DistributedSampler(lines, num_replicas=1, rank=0)  # type: ignore[arg-type]
    batches = DataLoader(lines, BATCH, sampler=order)  # type: ignore[arg-type]
    with in_double.staying_in_double():
        expected, numbers = train_plainly(model, batches, itertools.repeat(1e-3))
    assert len(numbers) == 6
    np.testing.assert_allclose(numbers_in(printed), numbers, rtol=1e-9)
    assert largest_difference(expected, tmp_path / "out") < 1e-9


def _over_replicas() -> None:
    engine = Fabric(worker_mesh(tp=2, dp=2))
    mesh = worker_mesh(tp=2, dp=2)
    replica, rank = mesh.get_local_rank("dp"), dist.get_rank()
    assert engine.all_reduce(torch.tensor(float(replica)), reduce_op="sum").item() == 1
    assert engine.all_reduce(torch.tensor(float(replica))).item() == 0.5
    assert engine.all_gather(torch.tensor([replica])).tolist() == [[0], [1]]
    assert engine.strategy.reduce_boolean_decision(True)
    assert not engine.strategy.reduce_boolean_decision(rank != 3)
    assert engine.strategy.reduce_boolean_decision(rank == 3, all=False)
    own = list(engine.setup_dataloaders(DataLoader(range(8), None)))  # type: ignore[arg-type]
    assert [int(one) for one in own] == list(range(replica, 8, 2))


def _goes_on(folder: Path, dp: int) -> None:
    mesh = worker_mesh(tp=2, dp=dp)
    engine = Fabric(mesh)
    generator = torch.Generator().manual_seed(mesh.get_local_rank("dp"))

    def build() -> dict[str, Any]:
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 3)).double()
        model = colrow.parallelize(whole, mesh, (torch.rand(2, 6, dtype=torch.float64),))
        model, optimizer = engine.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"cut": model, "adam": optimizer, "schedule": schedule, "done": 0}

    def train(state: dict[str, Any]) -> torch.Tensor:
        for is_last in (False, True):
            with engine.no_backward_sync(state["cut"], enabled=not is_last):
                x = torch.rand(4, 6, dtype=torch.float64, generator=generator)
                engine.backward(state["cut"](x).square().mean())
        engine.clip_gradients(state["cut"], state["adam"], max_norm=0.01)
        state["adam"].step()
        state["schedule"].step()
        state["adam"].zero_grad()
        state["done"] += 1
        colrow.check_replicas(state["cut"])
        return torch.cat([one.detach().flatten().clone() for one in state["cut"].parameters()])

    state = build()
    first = train(state)
    engine.save(folder / "saved", state)
    place = generator.get_state()
    second = train(state)
    assert not torch.equal(first, second)
    generator.set_state(place)
    state = build()
    engine.load(folder / "saved", state)
    assert state["done"] == 1
    assert torch.equal(train(state), second)


def _wrong_calls() -> None:
    with pytest.raises(ValueError, match=r"tp=\.\.\., dp=\.\.\."):
        TensorParallelStrategy(worker_mesh(tp=2, dp=2)["tp"])
    engine = Fabric(worker_mesh(tp=2, dp=2))
    with pytest.raises(ValueError, match="has not been parallelized"):
        engine.setup(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0 models and 0 optimizers"):
        engine.save("nowhere", {"step": 1})
    model = colrow.parallelize(nn.Linear(2, 2), worker_mesh(tp=2, dp=2), (torch.rand(1, 2),))
    with pytest.raises(ValueError, match="save_pretrained"):
        engine.strategy.get_module_state_dict(model)


def _under_torchrun(task: Callable[..., None], *arguments: object) -> None:
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": "0",
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "none",
    }
    with mock.patch.dict(os.environ, variables):
        task(*arguments)


def test_results_are_over_replicas(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_under_torchrun, _over_replicas)


@pytest.mark.parametrize("dp", [1, 2])
def test_going_on_from_a_checkpoint(ranks: Callable[[int], Pool], tmp_path: Path, dp: int) -> None:
    ranks(2 * dp).run(_under_torchrun, _goes_on, tmp_path, dp)


def test_wrong_calls(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_under_torchrun, _wrong_calls)
