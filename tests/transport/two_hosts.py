"""What each rank of test_two_hosts runs: a cut model against the whole one; then a rank may die."""

from __future__ import annotations

import copy
import os
import signal
import sys

import torch
from torch import nn

import colrow
from colrow.collectives import communicator
from colrow.transport import HierarchicalGroup, share_memory


def main(victim: int) -> None:
    """Print one line that the test looks for."""
    mesh = colrow.init_mesh(tp=int(os.environ["WORLD_SIZE"]), timeout=60)
    ranks = communicator(mesh)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    cut = colrow.parallelize(copy.deepcopy(whole), mesh, (x,))
    torch.testing.assert_close(cut(x), whole(x), rtol=0, atol=1e-12)
    for model in (whole, cut):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
    colrow.unshard(cut)
    for mine, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    memory = share_memory(ranks.group)
    assert isinstance(memory, HierarchicalGroup)
    ranks.barrier()
    if ranks.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        total = ranks.all_reduce(torch.ones(300_000), label="last").sum().item()
        print(f"rank {ranks.rank} on {memory.hosts}: {total:.0f}", flush=True)
    except colrow.RankFailure as failure:
        print(f"rank {ranks.rank} failed because of {failure.ranks}: {failure}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
