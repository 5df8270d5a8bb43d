"""Two hosts with a network between them, as namespaces of one machine where it allows that."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
