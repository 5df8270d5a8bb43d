"""A rank that is gone ends a pipeline's step on all others, and is named."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest
import torch.distributed as dist

import colrow
from tests.collectives import crew
from tests.parallel.pipeline.models import batch_of, build, example_of


def _train(event: str, guilty: int) -> None:
    mesh = colrow.init_mesh(pp=2, device="cpu", timeout=15)
    pipeline = colrow.pipeline_parallel(build("skips"), mesh, example_of("skips"))
    pipeline.step(batch_of("skips"))
    with crew.timed():
        if dist.get_rank() == guilty:
            pipeline.units()[0].register_forward_pre_hook(lambda *_: _happen(event))
        pipeline.step(batch_of("skips"))


def _happen(event: str) -> Any:
    if event == "kill":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    raise TypeError("boom")


@pytest.mark.parametrize("guilty", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_dies_in_a_step(guilty: int) -> None:
    ends = crew.run(_train, "kill", guilty, size=2)
    assert ends[guilty].code == -signal.SIGKILL
    other = ends[1 - guilty]
    assert other.ranks == (guilty,), other
    assert "a step of the pipeline" in other.message
    assert f"rank {guilty} died" in other.message
    assert other.seconds < 12  # long before the timeout


def test_a_rank_raises_in_a_step() -> None:
    ends = crew.run(_train, "raise", 1, size=2)
    assert ends[1].code == 1
    assert ends[0].ranks == (1,), ends[0]
    assert "rank 1 raised TypeError: boom" in ends[0].message
