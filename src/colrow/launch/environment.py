"""Which launcher has started this process, and what it says about ranks, in torch's own variables.

Everything here is a function of an environment (a mapping of strings), so that no launcher is needed to
test it.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

Environment = Mapping[str, str]

DEFAULT_PORT = 29500
FIRST_PORT, NUMBER_OF_PORTS = 10000, 20000
"""Ports derived from a job's number: below those that operating systems hand out by themselves."""
FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers its batch scripts and interactive shells from here on; they are not started by srun."""


@dataclass(frozen=True)
class Job:
    """What a launcher says about this process.

    Attributes:
        launcher: ``torch``, ``Open MPI``, ``Slurm`` or ``PMI`` (MPICH, Intel MPI).
        rank: this process among all of the job.
        size: number of processes of the job.
        local_rank: this process among those of its host.
        local_size: number of processes of this host.
        address: host name or address of the host of rank 0.
        port: a port that is free there.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    def variables(self) -> dict[str, str]:
        """What ``torch.distributed`` reads."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def find_job(environment: Environment | None = None) -> Job | None:
    """What the launcher of this process says, or ``None`` if it was started alone.

    torch's own variables come first (torchrun, accelerate and colrow set them), then those of mpirun, which
    may itself run inside of Slurm, then Slurm's. One task of Slurm or MPI alone is no job of several ranks,
    and neither is a shell or batch script within an allocation: only ``srun`` starts ranks.

    Args:
        environment: default: that of this process.

    Raises:
        ValueError: if the launcher's variables are incomplete or are not numbers.
    """
    environment = os.environ if environment is None else environment
    for find in (_find_torch, _find_open_mpi, _find_slurm, _find_pmi):
        job = find(environment)
        if job is not None:
            return job
    return None


def under_launcher(environment: Environment | None = None) -> bool:
    """Whether a launcher has started this process as one rank of a job, so that it must not start ranks.

    Raises:
        ValueError: see :func:`find_job`.
    """
    return find_job(environment) is not None


def restarts(environment: Environment | None = None) -> int:
    """How often torchrun has started all of the job's processes again after one of them had failed."""
    environment = os.environ if environment is None else environment
    return _whole(environment, "TORCHELASTIC_RESTART_COUNT", 0)


def apply(environment: MutableMapping[str, str] | None = None) -> Job | None:
    """Fill in what ``torch.distributed`` reads, so that :func:`colrow.init_mesh` joins the launcher's job.

    Variables that are set already stay as they are.

    Raises:
        ValueError: see :func:`find_job`.
    """
    environment = os.environ if environment is None else environment
    job = find_job(environment)
    if job is not None:
        for name, value in job.variables().items():
            environment[name] = environment.get(name) or value
    return job


def _find_torch(environment: Environment) -> Job | None:
    if "RANK" not in environment:
        return None
    needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise ValueError(
            f"RANK is set but not {', '.join(missing)}: start the ranks with torchrun or colrow, "
            f"set all of RANK, {', '.join(needed)}, or unset RANK"
        )
    rank, size = _whole(environment, "RANK"), _whole(environment, "WORLD_SIZE")
    address = environment["MASTER_ADDR"]
    # started by hand: ranks that find each other through the loopback interface are all on this host
    is_one_host = address in ("localhost", "127.0.0.1", "::1")
    return Job(
        "torch",
        rank,
        size,
        _whole(environment, "LOCAL_RANK", rank if is_one_host else 0),
        _whole(environment, "LOCAL_WORLD_SIZE", size if is_one_host else 1),
        address,
        _whole(environment, "MASTER_PORT"),
    )


def _find_open_mpi(environment: Environment) -> Job | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    name = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid", "")
    return _mpi_job(
        environment,
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        (("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),),
        _port_of(zlib.crc32(name.encode())) if name else DEFAULT_PORT,
    )


def _find_pmi(environment: Environment) -> Job | None:
    if "PMI_RANK" not in environment:
        return None
    local = (("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"))
    return _mpi_job(environment, "PMI", ("PMI_RANK", "PMI_SIZE"), local, DEFAULT_PORT)


def _mpi_job(
    environment: Environment,
    launcher: str,
    names: tuple[str, str],
    local_names: tuple[tuple[str, str], ...],
    port: int,
) -> Job | None:
    rank, size = (_whole(environment, name) for name in names)
    if size == 1:
        return None
    found = [pair for pair in local_names if pair[0] in environment and pair[1] in environment]
    if found:
        local_rank, local_size = (_whole(environment, name) for name in found[0])
    elif "LOCAL_RANK" in environment and "LOCAL_WORLD_SIZE" in environment:
        local_rank, local_size = _whole(environment, "LOCAL_RANK"), _whole(environment, "LOCAL_WORLD_SIZE")
    else:
        raise ValueError(
            f"{launcher} does not say how many of its {size} ranks are on this host: set LOCAL_RANK and "
            f"LOCAL_WORLD_SIZE for each, or start the ranks with torchrun"
        )
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else "")
    if not address:
        raise ValueError(
            f"{launcher} has started {size} ranks on several hosts but does not say where rank 0 is: "
            f"set MASTER_ADDR to its host for all ranks, such as mpirun -x MASTER_ADDR=$(hostname) ..., "
            f"and MASTER_PORT to a free port there (default {DEFAULT_PORT})"
        )
    return Job(
        launcher, rank, size, local_rank, local_size, address, _whole(environment, "MASTER_PORT", port)
    )


def _find_slurm(environment: Environment) -> Job | None:
    step = environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID", "")
    if not step.isdecimal() or int(step) >= FIRST_SPECIAL_STEP or "SLURM_PROCID" not in environment:
        return None  # not started by srun: the number of tasks is what the allocation has room for
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    size = _whole(environment, tasks)
    if size == 1 or size != _whole(environment, "PMI_SIZE", size):  # mpirun's daemons are tasks of srun, too
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    # rank 0 is on the first node of the list; srun itself may have been called on another
    address = first_host(nodes) if nodes else environment.get("SLURM_LAUNCH_NODE_IPADDR", "")
    address = environment.get("MASTER_ADDR") or address
    if not address:
        raise ValueError("Slurm does not say where rank 0 is: set MASTER_ADDR to the host of rank 0")
    number = _whole(environment, "SLURM_JOB_ID", 0) + 101 * int(step)
    return Job(
        "Slurm",
        _whole(environment, "SLURM_PROCID"),
        size,
        _whole(environment, "SLURM_LOCALID"),
        _slurm_local_size(environment, size),
        address,
        _whole(environment, "MASTER_PORT", _port_of(number)),
    )


def _slurm_local_size(environment: Environment, size: int) -> int:
    """Tasks on this node, from a list such as ``4(x2),3``: four on each of two nodes, three on the next."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _whole(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else size


def first_host(nodes: str) -> str:
    """The first host of Slurm's short form: ``node[003-005,9],other`` begins with ``node003``."""
    depth, first = 0, ""
    for character in nodes:
        if character == "," and depth == 0:
            break
        depth += {"[": 1, "]": -1}.get(character, 0)
        first += character
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)


def _port_of(number: int) -> int:
    return FIRST_PORT + number % NUMBER_OF_PORTS


def _whole(environment: Environment, name: str, default: int | None = None) -> int:
    value = environment.get(name, "")
    if not value and default is not None:
        return default
    if not value.isdecimal():
        raise ValueError(f"the environment variable {name} must be a whole number, not {value!r}")
    return int(value)
