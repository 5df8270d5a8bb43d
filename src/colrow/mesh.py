"""The named mesh of ranks: ``dp`` replicas, each cut over ``tp`` ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colrow.collectives.communicator import communicator
from colrow.collectives.failure import register_member, report_uncaught_exceptions
from colrow.collectives.join import join_job
from colrow.collectives.pending import Step
from colrow.collectives.statistics import Call
from colrow.collectives.subgroups import require_agreement
from colrow.transport import BACKEND, wish

DEFAULT_TIMEOUT_SECONDS = 300.0
LONGEST_TIMEOUT_SECONDS = 1e9


def init_mesh(
    tp: int = 1,
    dp: int = 1,
    *,
    device: str | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
) -> DeviceMesh:
    """A device mesh with the dimensions ``dp`` and ``tp``, tp innermost (neighbouring ranks).

    Joins the job's process group first if this process has not: from the environment that torchrun (or
    ``colrow train``) sets, or alone if there is none. NCCL serves GPUs. CPUs communicate through memory that
    the ranks of a host share, or gloo where there is none or ``COLROW_TRANSPORT=gloo`` is set.

    Args:
        tp: number of ranks that hold the slices of one model.
        dp: number of replicas of the model.
        device: ``"cpu"`` or ``"cuda"``; default: cuda if every local rank can have a GPU of its own.
        timeout: seconds after which a collective that some rank does not reach raises
            :class:`colrow.RankFailure` on the others; also for this call itself.

    Raises:
        ValueError: if a size is less than 1, dp x tp is not the number of ranks of the job, or the ranks'
            calls differ.
        RankFailure: if another rank does not join.
    """
    for name, size in (("tp", tp), ("dp", dp)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a whole number of ranks, at least 1, not {size!r}")
    if not isinstance(timeout, int | float) or not 0 < timeout <= LONGEST_TIMEOUT_SECONDS:
        raise ValueError(
            f"timeout must be positive seconds, at most {LONGEST_TIMEOUT_SECONDS:g}, not {timeout!r}"
        )
    if device is None:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_ranks else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' was asked for, but torch finds no GPU here")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")
    _check_world(dp, tp)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    limit = timedelta(seconds=timeout)
    if not dist.is_initialized():
        if "RANK" in os.environ:
            alone = os.environ.get("WORLD_SIZE") == "1"
            backend = "nccl" if device == "cuda" else "gloo" if alone or wish() == "gloo" else BACKEND
            join_job(backend, limit)
        else:
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=limit)
    register_member()
    report_uncaught_exceptions()
    if dist.get_world_size() > 1:
        made = dist.distributed_c10d._world.group_count
        own = {"dp": dp, "tp": tp, "device": device, "the number of process groups made before": made}
        require_agreement("init_mesh", own, limit, _remedy)
    meshes: list[DeviceMesh] = []
    step = Step(Call("init_mesh", "", "forward", 0), range(dist.get_world_size()))
    step.wait(lambda: meshes.append(init_device_mesh(device, (dp, tp), mesh_dim_names=("dp", "tp"))))
    mesh = meshes[0]
    for name in ("dp", "tp"):
        group = mesh.get_group(name)
        dist.distributed_c10d._set_pg_timeout(limit, group)
        communicator(group)
    return mesh


def _remedy(name: str) -> str:
    if name in ("dp", "tp", "device"):
        return "Call it with the same on all ranks."
    return (
        "torch finds a group by its number: call dist.new_group on all ranks of the job in the same order, "
        "also on those that are not members"
    )


def _check_world(dp: int, tp: int) -> None:
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if dp * tp == world:
        return
    choices = ", ".join(f"dp={world // size} tp={size}" for size in _divisors(world))
    start = "" if world > 1 else f" Start more: torchrun --nproc-per-node {dp * tp} ..."
    raise ValueError(
        f"dp={dp} x tp={tp} needs {dp * tp} ranks, but this job has {world}. "
        f"What fits {world}: {choices}.{start}"
    )


def _divisors(number: int) -> Iterator[int]:
    return (size for size in range(1, number + 1) if number % size == 0)


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that ``mesh`` was sliced from, or itself: its ranks are those that hold the model."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # torch before 2.10

    root: DeviceMesh = _mesh_resources.get_root_mesh(mesh)
    return root
