"""What the launchers of others say, from their variables alone."""

from __future__ import annotations

import pytest

from colrow.launch import environment
from colrow.launch.environment import Job, apply, find_job, first_host, under_launcher

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29501",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_NODELIST": "gpu[003-004,009]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-12345@1",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}


def _found(variables: dict[str, str]) -> Job:
    job = find_job(variables)
    assert job is not None
    return job


def test_nobody() -> None:
    assert find_job({"PATH": "/bin", "WORLD_SIZE": "4"}) is None
    assert not under_launcher({})
    variables = {"PATH": "/bin"}
    assert apply(variables) is None
    assert variables == {"PATH": "/bin"}


def test_torchrun() -> None:
    assert find_job(TORCHRUN) == Job("torch", 5, 8, 1, 4, "node7", 29501)
    assert under_launcher(TORCHRUN)
    variables = dict(TORCHRUN)
    apply(variables)
    assert variables == TORCHRUN


def test_one_process_of_torchrun_is_a_job() -> None:
    """Unlike one task of Slurm: who starts torchrun wants its ranks."""
    assert under_launcher({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"})


def test_by_hand() -> None:
    base = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    here = _found({**base, "MASTER_ADDR": "localhost"})
    assert (here.local_rank, here.local_size) == (1, 2)
    elsewhere = _found({**base, "MASTER_ADDR": "node7"})
    assert (elsewhere.local_rank, elsewhere.local_size) == (0, 1)


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_torch_variables(missing: str) -> None:
    with pytest.raises(ValueError, match=f"RANK is set but not {missing}: start the ranks with torchrun"):
        find_job({name: value for name, value in TORCHRUN.items() if name != missing})


def test_variables_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="RANK must be a whole number, not 'first'"):
        find_job({**TORCHRUN, "RANK": "first"})
    with pytest.raises(ValueError, match="OMPI_COMM_WORLD_SIZE must be a whole number, not '-4'"):
        find_job({**MPIRUN, "OMPI_COMM_WORLD_SIZE": "-4"})


def test_slurm() -> None:
    job = _found(SRUN)
    assert job == Job("Slurm", 4, 7, 1, 3, "gpu003", 10000 + 4711)
    third = {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    assert _found({**SRUN, **third}).local_size == 1
    variables = dict(SRUN)
    apply(variables)
    assert {name: variables[name] for name in TORCHRUN} == job.variables()


def test_slurms_ports_differ_between_jobs_and_steps_but_not_between_ranks() -> None:
    port = _found(SRUN).port
    assert _found({**SRUN, "SLURM_PROCID": "0"}).port == port
    assert _found({**SRUN, "SLURM_JOB_ID": "4712"}).port != port
    assert _found({**SRUN, "SLURM_STEP_ID": "1"}).port != port
    for number in ("1", "99999999", "123456789012"):
        assert 10000 <= _found({**SRUN, "SLURM_JOB_ID": number}).port < 30000


def test_slurm_with_the_users_own_address() -> None:
    job = _found({**SRUN, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "1234"})
    assert (job.address, job.port) == ("10.1.1.1", 1234)


def test_slurm_without_lists() -> None:
    bare = {name: value for name, value in SRUN.items() if "LIST" not in name and "TASKS_PER" not in name}
    assert _found(bare).address == "10.0.0.1"
    assert _found(bare).local_size == 7
    with pytest.raises(ValueError, match="set MASTER_ADDR to the host of rank 0"):
        find_job({name: value for name, value in bare.items() if "IPADDR" not in name})


@pytest.mark.parametrize(
    "step",
    [
        {"SLURM_STEP_ID": None},  # salloc's shell, or an old sbatch script
        {"SLURM_STEP_ID": "4294967291"},  # sbatch script
        {"SLURM_STEP_ID": "4294967290"},  # interactive step
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash, in an allocation for seven tasks
    ],
)
def test_within_an_allocation_but_not_started_by_srun(step: dict[str, str | None]) -> None:
    variables = {name: value for name, value in {**SRUN, **step}.items() if value is not None}
    assert find_job(variables) is None


def test_slurms_old_name_of_the_step() -> None:
    variables = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert _found({**variables, "SLURM_STEPID": "0"}).launcher == "Slurm"


def test_open_mpi() -> None:
    job = _found(MPIRUN)
    assert job == Job("Open MPI", 1, 4, 1, 4, "127.0.0.1", job.port)
    assert 10000 <= job.port < 30000
    assert _found({**MPIRUN, "PMIX_NAMESPACE": "prterun-host-12346@1"}).port != job.port
    assert find_job({**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_open_mpi_on_several_hosts() -> None:
    several = {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "8"}
    with pytest.raises(ValueError, match=r"set MASTER_ADDR to its host .* mpirun -x MASTER_ADDR"):
        find_job(several)
    assert _found({**several, "MASTER_ADDR": "node1"}).address == "node1"


def test_mpirun_within_slurm() -> None:
    """mpirun starts its daemons with srun, one per node, and its ranks inherit what Slurm says of those."""
    daemon = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    assert _found({**daemon, **MPIRUN}).launcher == "Open MPI"
    assert _found({**daemon, **HYDRA}) == Job("PMI", 3, 4, 3, 4, "127.0.0.1", 29500)
    started_by_srun = _found({**SRUN, "PMI_RANK": "4", "PMI_SIZE": "7"})
    assert started_by_srun.launcher == "Slurm"


def test_pmi() -> None:
    assert find_job(HYDRA) == Job("PMI", 3, 4, 3, 4, "127.0.0.1", 29500)
    assert find_job({**HYDRA, "PMI_SIZE": "1"}) is None
    bare = {"PMI_RANK": "3", "PMI_SIZE": "4"}
    with pytest.raises(ValueError, match="does not say how many of its 4 ranks are on this host"):
        find_job(bare)
    told = {**bare, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
    assert find_job(told) == Job("PMI", 3, 4, 1, 2, "node1", 29500)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node7,node8", "node7"),
        ("node[003-005,9],other", "node003"),
        ("node[3,5-9]", "node3"),
        ("rack[1-2]n[04-09]", "rack1n04"),
        ("a-b-[10-12].cluster", "a-b-10.cluster"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_processs_own_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", *SRUN, *MPIRUN, *HYDRA):
        monkeypatch.delenv(name, raising=False)
    assert not environment.under_launcher()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert environment.under_launcher()
