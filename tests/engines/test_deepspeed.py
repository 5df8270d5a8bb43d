"""DeepSpeed's ZeRO on a cut model trains as plain PyTorch does in one process that has all data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import colrow
from colrow.engines.deepspeed import count_once, initialize, mpu
from colrow.state import placed_parameters
from tests.engines.job import BATCH, largest_difference, numbers_in, run_example, train_plainly, write_job
from tests.pool import Pool, worker_mesh

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (4, 1), (4, 2)])
def test_the_example(tmp_path: Path, ranks: int, stage: int) -> None:
    pytest.importorskip("deepspeed")
    # DeepSpeed keeps what it optimizes in single precision
    model, text = write_job(tmp_path, torch.float32)
    out = tmp_path / "out"
    printed = run_example("with_deepspeed", ranks, model, text, out, str(stage), in_double=False)
    lines = text.read_text().splitlines()
    order: DistributedSampler[str] = DistributedSampler(lines, num_replicas=1, rank=0)  # type: ignore[arg-type]
    batches = DataLoader(lines, BATCH, sampler=order)  # type: ignore[arg-type]
    expected, numbers = train_plainly(model, batches, itertools.repeat(1e-3))
    assert len(numbers) == 6
    np.testing.assert_allclose(numbers_in(printed), numbers, rtol=1e-6)
    assert largest_difference(expected, out) < 1e-5  # of steps of 1e-3; AdamW enlarges rounding


def _unit() -> None:
    mesh = worker_mesh(tp=2, dp=2)
    unit, rank = mpu(mesh), dist.get_rank()
    replica, part = divmod(rank, 2)
    assert (unit.get_data_parallel_rank(), unit.get_data_parallel_world_size()) == (replica, 2)
    assert (unit.get_model_parallel_rank(), unit.get_tensor_model_parallel_world_size()) == (part, 2)
    assert unit.get_data_parallel_group_ranks() == [part, part + 2]
    assert unit.get_data_parallel_group() is mesh["dp"].get_group()
    assert dist.get_process_group_ranks(unit.get_tensor_model_parallel_group()) == [
        2 * replica,
        2 * replica + 1,
    ]
    assert unit.get_tensor_model_parallel_src_rank() == 2 * replica
    with pytest.raises(ValueError, match=r"tp=\.\.\., dp=\.\.\."):
        mpu(mesh["tp"])


def _llama(mesh: DeviceMesh, heads: int, key_value_heads: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=40,
        intermediate_size=33,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=4,
        tie_word_embeddings=True,
    )
    ids = torch.zeros(1, 5, dtype=torch.long)
    return colrow.parallelize(LlamaForCausalLM(config), mesh, {"input_ids": ids, "labels": ids})


def _counts() -> None:
    """Every element once: cut ones, replicated ones, and the key-value heads that ranks share."""
    mesh = worker_mesh(tp=3)
    for heads, key_value_heads in ((5, 1), (8, 2)):
        model = _llama(mesh, heads, key_value_heads)
        is_shared = any(placed.layout.is_shared for placed in placed_parameters(model))
        assert is_shared == (key_value_heads == 2)  # one head is whole on all ranks
        count_once(model)
        is_first = mesh.get_local_rank("tp") == 0
        counted = [one.numel() for one in model.parameters() if is_first or one.tensor_model_parallel]
        number = torch.tensor(sum(counted))
        dist.all_reduce(number)
        assert int(number) == colrow.count_parameters(model).total
    with (
        mock.patch("colrow.engines.deepspeed._share", return_value=0.5),
        pytest.raises(ValueError, match=r"k_proj\.weight, and DeepSpeed's norm counts"),
    ):
        count_once(model)


def _wrong_calls() -> None:
    mesh = worker_mesh(tp=2, dp=2)
    with pytest.raises(ValueError, match="has not been parallelized"):
        initialize(nn.Linear(2, 2), {})
    model = colrow.parallelize(nn.Linear(2, 2), mesh, (torch.rand(1, 2),))
    for stage in (0, 3):
        with pytest.raises(ValueError, match=f"1 or 2 for a cut model, not {stage}"):
            initialize(model, {"zero_optimization": {"stage": stage}})
    with pytest.raises(ValueError, match="leave out DeepSpeed's tensor_parallel"):
        initialize(model, {"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}})
    with torch.no_grad():
        model.weight += mesh.get_local_rank("dp")
    with pytest.raises(colrow.PlanError, match="the ranks hold different weights"):
        initialize(model, {"zero_optimization": {"stage": 1}})


@pytest.mark.parametrize(("number", "task"), [(4, _unit), (3, _counts), (4, _wrong_calls)])
def test_what_deepspeed_is_told(ranks: Callable[[int], Pool], number: int, task: Callable[[], None]) -> None:
    ranks(number).run(task)
