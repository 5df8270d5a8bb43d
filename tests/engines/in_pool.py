"""Tasks in workers of the pool that use accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest import mock

import torch.distributed as dist
from accelerate.state import AcceleratorState


def on_its_own(task: Callable[..., None], *arguments: object) -> None:
    """accelerate keeps state in the process, and reads what torchrun sets."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with mock.patch.dict(os.environ, variables):
        try:
            task(*arguments)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
