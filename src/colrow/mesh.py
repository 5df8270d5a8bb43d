"""The named mesh of ranks: how many share layers, data, experts, sequences and weights, and who is where."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
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

DIMENSIONS = ("pp", "dp", "ep", "cp", "tp")
"""The dimensions of a mesh from the outermost, whose ranks may be far apart, to neighbouring ranks."""

_ALWAYS = ("dp", "tp")
_REPLICAS = ("dp", "ep", "cp")
_REPLICAS_OF_EXPERTS = ("dp", "cp")


def init_mesh(
    tp: int = 1,
    dp: int = 1,
    *,
    pp: int = 1,
    ep: int = 1,
    cp: int = 1,
    device: str | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
) -> DeviceMesh:
    """A device mesh with the dimensions ``pp``, ``dp``, ``ep``, ``cp`` and ``tp``, tp innermost.

    Neighbouring ranks differ in ``tp`` first, so that the ranks that communicate most are on one host. The
    mesh always has ``dp`` and ``tp``, and of the others those that are larger than 1.

    Joins the job's process group first if this process has not: from the environment that torchrun (or
    ``colrow train``) sets, or alone if there is none. NCCL serves GPUs. CPUs communicate through memory that
    the ranks of a host share, or gloo where there is none or ``COLROW_TRANSPORT=gloo`` is set.

    Args:
        tp: number of ranks that hold the slices of one layer.
        dp: number of replicas of the model, each with its own part of the data.
        pp: number of stages of a pipeline: each holds some of the layers.
        ep: number of ranks that divide the experts of a layer among them. Each has its own part of the data,
            as replicas have.
        cp: number of ranks that divide each sequence among them.
        device: ``"cpu"`` or ``"cuda"``; default: cuda if every local rank can have a GPU of its own.
        timeout: seconds after which a collective that some rank does not reach raises
            :class:`colrow.RankFailure` on the others; also for this call itself.

    Raises:
        ValueError: if a size is less than 1, their product is not the number of ranks of the job, or the
            ranks' calls differ.
        RankFailure: if another rank does not join.
    """
    given = {"pp": pp, "dp": dp, "ep": ep, "cp": cp, "tp": tp}
    for name, size in given.items():
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
    sizes = {name: size for name, size in given.items() if size > 1 or name in _ALWAYS}
    _check_world(sizes)
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
        own = {**given, "device": device, "the number of process groups made before": made}
        require_agreement("init_mesh", own, limit, _remedy)
    meshes: list[DeviceMesh] = []
    step = Step(Call("init_mesh", "", "forward", 0), range(dist.get_world_size()))
    step.wait(lambda: meshes.append(_make(device, sizes)))
    mesh = meshes[0]
    flattened = (replicas(mesh).get_group(), replicas_of_experts(mesh).get_group())
    for group in {id(group): group for group in (*mesh.get_all_groups(), *flattened)}.values():
        dist.distributed_c10d._set_pg_timeout(limit, group)
        communicator(group)
    return mesh


def _make(device: str, sizes: Mapping[str, int]) -> DeviceMesh:
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    replicas(mesh), replicas_of_experts(mesh)  # groups are made by all ranks together
    return mesh


def _remedy(name: str) -> str:
    if name in DIMENSIONS or name == "device":
        return "Call it with the same on all ranks."
    return (
        "torch finds a group by its number: call dist.new_group on all ranks of the job in the same order, "
        "also on those that are not members"
    )


def _check_world(sizes: Mapping[str, int]) -> None:
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    needed = math.prod(sizes.values())
    if needed == world:
        return
    wanted = " x ".join(f"{name}={size}" for name, size in sizes.items())
    start = "" if world > 1 else f" Start more: torchrun --nproc-per-node {needed} ..."
    raise ValueError(
        f"{wanted} needs {needed} ranks, but this job has {world}. "
        f"What fits {world}: {_what_fits(sizes, world)}.{start}"
    )


def _what_fits(sizes: Mapping[str, int], world: int) -> str:
    """Meshes of as many ranks: other dp and tp, and the other dimensions as they are if that is possible."""
    others = {name: size for name, size in sizes.items() if name not in _ALWAYS}
    if world % math.prod(others.values()):
        others = {}
    left = world // math.prod(others.values())
    choices = []
    for tp in _divisors(left):
        chosen = {**others, "dp": left // tp, "tp": tp}
        choices.append(" ".join(f"{name}={chosen[name]}" for name in DIMENSIONS if name in chosen))
    return ", ".join(choices)


def _divisors(number: int) -> Iterator[int]:
    return (size for size in range(1, number + 1) if number % size == 0)


def size_of(mesh: DeviceMesh, name: str) -> int:
    """Number of ranks along a dimension of a mesh; 1 if it has none of that name."""
    return mesh[name].size() if name in (mesh.mesh_dim_names or ()) else 1


def coordinate(mesh: DeviceMesh, name: str) -> int:
    """This rank's place along a dimension of a mesh; 0 if it has none of that name."""
    return int(mesh.get_local_rank(name)) if name in (mesh.mesh_dim_names or ()) else 0


def replicas(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that hold the same parts of all weights but experts: of ``dp``, ``ep`` and ``cp`` together.

    They compute with different tokens, so that gradients are summed over them.

    Raises:
        ValueError: if the mesh has no dimension ``dp``.
    """
    return _together(mesh, _REPLICAS, "replicas")


def replicas_of_experts(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that hold the same parts of experts, which are divided over ``ep``: of ``dp`` and ``cp``.

    Raises:
        ValueError: if the mesh has no dimension ``dp``.
    """
    return _together(mesh, _REPLICAS_OF_EXPERTS, "replicas_of_experts")


def _together(mesh: DeviceMesh, dimensions: tuple[str, ...], name: str) -> DeviceMesh:
    """The ranks along several dimensions as one."""
    if "dp" not in (mesh.mesh_dim_names or ()):
        raise ValueError("the mesh has no dimension dp: make it with colrow.init_mesh(tp=..., dp=...)")
    several = tuple(one for one in dimensions if size_of(mesh, one) > 1)
    if len(several) < 2:
        return mesh[several[0] if several else "dp"]
    if size_of(mesh, "ep") == 1:
        name = "replicas"  # of everything
    return mesh[several]._flatten(name)  # the same one each time


def data_part(mesh: DeviceMesh) -> tuple[int, int]:
    """Which part of a batch this rank computes, and of how many: along ``dp`` and ``ep`` each has its own."""
    experts = size_of(mesh, "ep")
    return coordinate(mesh, "dp") * experts + coordinate(mesh, "ep"), size_of(mesh, "dp") * experts


def mesh_table(mesh: DeviceMesh) -> str:
    """Which rank is where, to be read: one line for the ranks that differ in the last dimension only."""
    names, ranks = mesh.mesh_dim_names or (), mesh.mesh
    width = max(len(f"{names[-1]}={ranks.shape[-1] - 1}"), len(str(int(ranks.max()))))
    shown = [place for place, size in enumerate(ranks.shape[:-1]) if size > 1]
    lines = [("", [f"{names[-1]}={place}" for place in range(ranks.shape[-1])])]
    for places in itertools.product(*(range(size) for size in ranks.shape[:-1])):
        row = ranks[places].tolist()
        lines.append((" ".join(f"{names[one]}={places[one]}" for one in shown), [str(rank) for rank in row]))
    left = max(len(label) for label, _ in lines)
    return "\n".join(
        "  ".join([label.ljust(left), *(cell.rjust(width) for cell in cells)]).rstrip()
        for label, cells in lines
    )


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that ``mesh`` was sliced from, or itself: its ranks are those that hold the model."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # torch before 2.10

    root: DeviceMesh = _mesh_resources.get_root_mesh(mesh)
    return root
