"""The example with accelerate trains as plain PyTorch does in one process that has all data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import colrow
from tests.engines import in_double
from tests.engines.in_pool import on_its_own
from tests.engines.job import BATCH, largest_difference, numbers_in, run_example, train_plainly, write_job
from tests.pool import Pool, worker_mesh

accelerate = pytest.importorskip("accelerate")

from accelerate import DataLoaderConfiguration  # noqa: E402

from colrow.data_shards import held  # noqa: E402
from colrow.engines.accelerate import Accelerator  # noqa: E402
from colrow.engines.sharding import Data  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("ranks", "data"), [(2, "ddp"), (4, "ddp"), (4, "fsdp")])
def test_the_example(tmp_path: Path, ranks: int, data: str) -> None:
    model, text = write_job(tmp_path, torch.float64)
    printed = run_example("with_accelerate", ranks, model, text, tmp_path / "out", environment={"DATA": data})
    order = torch.Generator().manual_seed(0)
    batches = DataLoader(text.read_text().splitlines(), BATCH, shuffle=True, generator=order)
    with in_double.staying_in_double():
        expected, numbers = train_plainly(model, batches, itertools.repeat(1e-3))
    assert len(numbers) == 6
    np.testing.assert_allclose(numbers_in(printed), numbers, rtol=1e-9)
    assert largest_difference(expected, tmp_path / "out") < 1e-9


class _Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(12))


def _each_replica_counts_once() -> None:
    accelerator = Accelerator(worker_mesh(tp=2, dp=2))
    loader = accelerator.prepare_data_loader(DataLoader(torch.arange(10), 3))
    seen, named = [], []
    for batch in loader:
        seen.append(accelerator.gather_for_metrics(batch))
        named += accelerator.gather_for_metrics([f"item {one}" for one in batch])
    # 10 items are 6 in the first step and 4 in the second, which two of the first fill up
    assert torch.cat(seen).tolist() == list(range(10))
    assert named == [f"item {one}" for one in range(10)]
    streamed = accelerator.prepare_data_loader(DataLoader(_Stream(), 3))
    own = torch.cat([*streamed])
    assert (
        own.tolist() == [0, 1, 2, 6, 7, 8]
        if accelerator.mesh.get_local_rank("dp") == 0
        else [3, 4, 5, 9, 10, 11]
    )
    replica = torch.tensor(accelerator.mesh.get_local_rank("dp") + 1)
    assert accelerator.gather(replica).tolist() == [1, 2]
    assert accelerator.gather({"of both": replica[None, None]})["of both"].tolist() == [[1], [2]]
    assert accelerator.reduce(replica).item() == 3
    assert accelerator.reduce(replica.double(), "mean").item() == 1.5
    with pytest.raises(ValueError, match="'sum', 'mean' or 'none'"):
        accelerator.reduce(replica, "max")


def _goes_on(folder: Path, data: Data) -> None:
    mesh = worker_mesh(tp=2, dp=2)
    accelerator = Accelerator(mesh, data, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Dropout(0.2), nn.Linear(9, 3)).double()
    model = colrow.parallelize(whole, mesh, (torch.rand(2, 6, dtype=torch.float64),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    generator = torch.Generator().manual_seed(mesh.get_local_rank("dp"))
    prepared = accelerator.prepare(model, optimizer, schedule)

    def train() -> torch.Tensor:
        model, optimizer, schedule = prepared
        for _ in range(2):
            with accelerator.accumulate(model):
                x = torch.rand(4, 6, dtype=torch.float64, generator=generator)
                accelerator.backward(model(x).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.01)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        colrow.check_replicas(model)
        return torch.cat([held(parameter).detach().flatten().clone() for parameter in model.parameters()])

    first = train()
    accelerator.save_state(folder)
    state = generator.get_state()
    second = train()
    assert not torch.equal(first, second)
    accelerator.load_state(folder)
    generator.set_state(state)
    assert torch.equal(train(), second)  # with dropout, and at the schedule's rate
    with pytest.raises(ValueError, match=r"clip model.parameters\(\)"):
        accelerator.clip_grad_norm_(list(model.parameters())[:1], 1.0)
    with pytest.raises(ValueError, match="save_pretrained"):
        accelerator.get_state_dict(prepared[0])


def _wrong_calls() -> None:
    with pytest.raises(ValueError, match=r"tp=\.\.\., dp=\.\.\."):
        Accelerator(worker_mesh(tp=2, dp=2)["tp"])
    with pytest.raises(ValueError, match="parallelism_config: the mesh says"):
        Accelerator(worker_mesh(tp=2, dp=2), parallelism_config=accelerate.ParallelismConfig())
    config = DataLoaderConfiguration(dispatch_batches=True)
    with pytest.raises(ValueError, match="dispatch_batches gives all replicas the same"):
        Accelerator(worker_mesh(tp=2, dp=2), dataloader_config=config)
    with pytest.raises(ValueError, match="has not been parallelized"):
        Accelerator(worker_mesh(tp=2, dp=2)).prepare_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="data must be 'ddp' or 'fsdp', not 'zero'"):
        Accelerator(worker_mesh(tp=2, dp=2), data="zero")  # type: ignore[arg-type]


def _made_steps() -> None:
    mesh = worker_mesh(tp=2, dp=2)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    model = colrow.parallelize(model, mesh, (torch.rand(2, 6),))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 6)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="the optimizer has made steps with the model before FSDP"):
        Accelerator(mesh, "fsdp").prepare(model, optimizer)


def test_an_optimizer_that_has_made_steps(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(on_its_own, _made_steps)


def test_each_replica_counts_once(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(on_its_own, _each_replica_counts_once)


@pytest.mark.parametrize("data", ["ddp", "fsdp"])
def test_going_on_from_a_saved_state(ranks: Callable[[int], Pool], tmp_path: Path, data: Data) -> None:
    ranks(4).run(on_its_own, _goes_on, tmp_path, data)


def test_wrong_calls(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(on_its_own, _wrong_calls)
