"""A builder file whose models do what the models of others may do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colrow.state import is_parallelized


def names() -> list[str]:
    return ["good", "raises", "hangs", "exits", "is killed", "cannot run", "dies in a rank", "differs"]


class Perceptron(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Dying(Perceptron):
    """Ends its process when it is one of several ranks."""

    def forward(self, x: Tensor) -> Tensor:
        if dist.is_initialized():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Differing(Perceptron):
    """Computes something else when it has been cut, in a way that nobody can foresee."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.5 if is_parallelized(self) else 1.0)


class Misused(Perceptron):
    """Does not take what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 1:])


MODELS = {"good": Perceptron, "dies in a rank": Dying, "differs": Differing, "cannot run": Misused}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "raises":
        raise LookupError("no such model today")
    if name == "hangs":
        Path(os.environ["AWKWARD_PID"]).write_text(str(os.getpid()))
        time.sleep(3600)
    if name == "exits":
        os._exit(7)
    if name == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return MODELS[name]().double(), {"x": torch.randn(2, 5, dtype=torch.float64)}
