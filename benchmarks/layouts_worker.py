"""What each rank of ``layouts.py`` runs: some training steps of one layout."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

import colrow
from colrow.mesh import data_part, replicas, size_of
from colrow.model import calls_for
from colrow.trace import Example
from step_worker import SIZES, build_model, peak_megabytes


def run(
    model: str, mesh: Mapping[str, int], steps: int, data: str = "ddp", schedule: str = "1f1b"
) -> dict[str, Any]:
    """Train the same global batches on any mesh, or, with an empty one, by the model alone.

    Returns:
        ``seconds``: median of a step, of the slowest rank; ``megabytes``: the highest resident memory of a
        rank above that before the model was made; ``loss``: of the last step.
    """
    ranks = colrow.init_mesh(**mesh, device="cpu")
    before = peak_megabytes()
    whole: Any = build_model(model)
    ids = torch.randint(SIZES[model].vocabulary, (2, 12))
    example = Example(keywords={"input_ids": ids, "labels": ids})
    calls = {"training": example, "evaluation": example} if size_of(ranks, "cp") > 1 else calls_for(whole)
    whole.config.use_cache = size_of(ranks, "cp") > 1  # with it transformers looks for no packed sequences
    cut: Any = colrow.parallelize(whole, ranks, calls).train() if mesh else whole.train()
    rows = SIZES[model].batch
    if size_of(ranks, "pp") > 1:
        pipeline: dict[str, Any] = {"schedule": schedule, "micro_batches": rows}
        cut = colrow.pipeline_parallel(cut, ranks, calls["training"], **pipeline).train()
    if replicas(ranks).size() > 1:
        cut = colrow.data_parallel(cut, ranks, "fsdp" if data == "fsdp" else "ddp")
    optimizer: torch.optim.Optimizer
    if data == "zero1":
        optimizer = colrow.zero_redundancy_optimizer(
            cut.parameters(), torch.optim.AdamW, ranks, model=cut, lr=1e-3
        )
    else:
        optimizer = torch.optim.AdamW(cut.parameters(), lr=1e-3)
    part, parts = data_part(ranks)
    generator = torch.Generator().manual_seed(1)
    times, loss = [], 0.0
    for _ in range(steps):
        shape = (rows, SIZES[model].sequence)
        batch = torch.randint(SIZES[model].vocabulary, shape, generator=generator).chunk(parts)[part]
        dist.barrier()
        begin = time.perf_counter()
        inputs = {"input_ids": batch, "labels": batch}
        if isinstance(cut, colrow.Pipeline):
            loss = cut.step(inputs).item()
        else:
            result = cut(**inputs).loss
            result.backward()
            loss = result.item()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    own = torch.tensor([statistics.median(times[1:]), peak_megabytes() - before], dtype=torch.float64)
    dist.all_reduce(own, dist.ReduceOp.MAX)
    mean = torch.tensor([loss], dtype=torch.float64)
    dist.all_reduce(mean)
    seconds, megabytes = own.tolist()
    return {"seconds": seconds, "megabytes": megabytes, "loss": mean.item() / dist.get_world_size()}
