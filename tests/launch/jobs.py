"""What the ranks of the launcher's tests run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import colrow
from colrow.collectives import communicator


def report(value: int) -> dict[str, Any]:
    """What rank 0 finds around it; prints on every rank."""
    size = int(os.environ["WORLD_SIZE"])
    mesh = colrow.init_mesh(tp=size, device="cpu", timeout=30)
    print(f"rank {os.environ['RANK']} speaks")
    print(f"rank {os.environ['RANK']} warns", file=sys.stderr)
    total = communicator(mesh).all_reduce(torch.tensor([float(os.environ["LOCAL_RANK"])]))
    return {
        "value": value,
        "total": total.item(),
        "threads": torch.get_num_threads(),
        "own session": os.getsid(0) == os.getpid(),
    }


def fail(how: str, guilty: int) -> None:
    """One rank fails while the others wait for it in a collective."""
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    ranks = communicator(colrow.init_mesh(tp=size, device="cpu", timeout=30))
    ranks.barrier()
    if how == "hang":
        ranks = communicator(colrow.init_mesh(tp=size, device="cpu", timeout=1))
    if rank == guilty:
        if how == "raise":
            raise TypeError("boom")
        if how == "kill":
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "return":
            return
        if how == "hang":
            time.sleep(60)
    ranks.all_reduce(torch.ones(3), label="exit mlp")
    time.sleep(60)


def refuse() -> None:
    """A check of the configuration that fails on all ranks alike."""
    raise ValueError("learning_rate must be positive, not -1")


def wait_with_child(folder: str, stubborn: int) -> None:
    """Leaves the numbers of this process and of a child in a file, and stays."""
    rank = int(os.environ["RANK"])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if rank == stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    path = Path(folder) / f"{rank}.part"
    path.write_text(f"{os.getpid()} {child.pid}")
    path.rename(path.with_suffix(".pids"))
    try:
        time.sleep(60)
    finally:
        (Path(folder) / f"{rank}.closed").touch()


def unpicklable() -> Any:
    return lambda: None
