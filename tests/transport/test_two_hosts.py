"""Two hosts with a network between them, as namespaces of one machine where it allows that."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from colrow.train.metrics import read_records
from colrow.train.parse import to_yaml
from tests.train.small import small
from tests.transport.available import needs_shared_memory

NAMESPACES = (
    "unshare --user --map-root-user --net --mount --pid --fork --kill-child --mount-proc".split()  # noqa: SIM905
)
SCRIPT = Path(__file__).with_name("two_hosts.sh")
PROGRAM = Path(__file__).with_name("two_hosts.py")


def _are_permitted() -> bool:
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "bash")):
        return False
    tried = subprocess.run(
        [*NAMESPACES, "bash", "-c", "mount --bind /dev/null /proc/sys/kernel/random/boot_id"],
        capture_output=True,
    )
    return tried.returncode == 0


pytestmark = [
    pytest.mark.slow,
    needs_shared_memory,
    pytest.mark.skipif(not _are_permitted(), reason="this system permits no namespaces"),
]


def _run(victim: int) -> tuple[int, list[str]]:
    command = [*NAMESPACES, "bash", str(SCRIPT), "4", sys.executable, str(PROGRAM), str(victim)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "shared memory on each of 2 hosts, gloo between" in done.stderr, done.stderr
    return done.returncode, sorted(done.stdout.splitlines())


def test_a_model_cut_over_two_hosts() -> None:
    status, lines = _run(-1)
    assert status == 0
    assert lines == [f"rank {rank} on ((0, 1), (2, 3)): 1200000" for rank in range(4)]


def test_a_rank_that_dies_on_the_other_host() -> None:
    status, lines = _run(3)
    assert status == 137
    assert len(lines) == 3
    for rank, line in enumerate(lines):
        assert line.startswith(f"rank {rank} failed because of (3,): all_reduce 'last' did not complete"), (
            line
        )
        assert "rank 3 died" in line, line


LAUNCHER = (
    'exec "$0" -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --local-addr $HOST_ADDRESS '
    '--rdzv-backend c10d --rdzv-endpoint 10.9.0.1:29500 --rdzv-id two --rdzv-conf is_host=$IS_FIRST "$@"'
)


def _losses(folder: Path) -> list[float]:
    return [float(one["loss"]) for one in read_records(folder / "metrics.jsonl")]


@pytest.mark.parametrize(("tp", "dp"), [(2, 2), (4, 1)])
def test_torchrun_on_two_hosts(tmp_path: Path, tp: int, dp: int) -> None:
    """``colrow train`` with parts of the model on one host each, or over both, beside one host."""
    configuration = small(tmp_path, steps=4, mesh={"tp": tp, "dp": dp})
    file, run = tmp_path / "run.yaml", ["-m", "colrow", "train"]
    file.write_text(to_yaml(configuration))
    command = [*NAMESPACES, "bash", str(SCRIPT), "0", "bash", "-c", LAUNCHER, sys.executable]
    over = subprocess.run([*command, *run, str(file)], capture_output=True, text=True, check=False)
    assert over.returncode == 0, over.stderr
    said = [line for line in over.stderr.splitlines() if "ranks communicate through" in line]
    assert any("shared memory on each of 2 hosts, gloo between" in line for line in said)
    if dp > 1:
        assert any("shared memory: they are on one host" in line for line in said)  # parts of the model
        assert any("gloo: its 2 ranks are on 2 hosts" in line for line in said)  # replicas
    one_host = [sys.executable, *run, str(file), "--run_dir", str(tmp_path / "one")]
    here = subprocess.run(one_host, capture_output=True, text=True, check=False)
    assert here.returncode == 0, here.stderr
    assert "hosts" not in here.stderr
    expected = _losses(tmp_path / "one")
    assert len(expected) == 4
    assert _losses(tmp_path / "run") == pytest.approx(expected, rel=1e-7)
