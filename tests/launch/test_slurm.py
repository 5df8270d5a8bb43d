"""The script for Slurm, with an ``srun`` that starts its command on this host and sets what srun sets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from colrow.launch.environment import FIRST_PORT
from colrow.train.metrics import read_records
from colrow.train.parse import to_yaml
from tests.train.small import small

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
TASKS = 2
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1"; shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS={tasks} SLURM_STEP_TASKS_PER_NODE={tasks} SLURM_NODEID=0
export SLURM_STEP_NODELIST=localhost
for task in $(seq 0 $(({tasks} - 1))); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  started="$started $!"
done
status=0
for process in $started; do wait $process || status=$?; done
exit $status
"""


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _job_number() -> str:
    """A job whose number gives a free port."""
    for number in range(4711, 4811):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", FIRST_PORT + number)):
                return str(number)
    raise AssertionError("a hundred ports are in use")


def _sbatch(folder: Path, *arguments: str) -> str:
    """What the script prints in an allocation of two tasks."""
    _program(folder / "bin" / "srun", SRUN.format(tasks=TASKS))
    _program(folder / "bin" / "colrow", f'#!/bin/sh\nexec {sys.executable} -m colrow "$@"\n')
    allocation = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": _job_number(),
        "SLURM_NTASKS": str(TASKS),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, **allocation},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_job_and_the_one_that_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(small(tmp_path, steps=4)))
    options = [str(file), "--mesh.tp", str(TASKS)]
    printed = _sbatch(tmp_path, *options)
    assert "srun --kill-on-bad-exit=1" in printed
    assert "nothing to resume" in printed
    printed = _sbatch(tmp_path, *options, "--steps", "6")
    assert "resuming after step 4" in printed
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [one["step"] for one in records] == [1, 2, 3, 4, 5, 6]
