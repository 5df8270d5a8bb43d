from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the tests' layers are too small for another library to be faster: do not try it in every process
os.environ.setdefault("COLROW_GEMM", "torch")

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.pool import Pool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Pool]]:
    """``ranks(n)``: a pool of n real processes, kept for the whole session."""
    pools: dict[int, Pool] = {}

    def get(size: int) -> Pool:
        if size not in pools or not pools[size].alive:
            pools[size] = Pool(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()
