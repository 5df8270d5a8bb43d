"""The comparison with peers: its processes, which fail in every way, and the environment they run in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers import environment
from benchmarks.peers.environment import Environment
from benchmarks.peers.group import Group, Place, SystemFailure
from benchmarks.peers.shapes import SHAPES, Case
from benchmarks.peers.systems import System

ROOT = Path(__file__).parents[2]
CASE = Case(SHAPES["tiny"], "fp32", 2)


def place(folder: Path, *, fault: str = "", timeout: float = 60.0) -> Place:
    variables = {"FAULT": fault} if fault else {}
    program = (str(Path(__file__).with_name("peer_worker.py")),)
    return Place(Path(sys.executable), folder, folder / "logs", timeout, variables, program)


def test_processes_answer_in_rank_order(tmp_path: Path) -> None:
    group = Group(System.parse("colrow"), CASE, place(tmp_path))
    try:
        assert group.ask("build") == [{"notes": ["threads 1"]}] * 2
        assert [answer["peak_mb"] for answer in group.ask("report")] == [10.0, 11.0]
    finally:
        group.close()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raises:build:1", "ValueError: heads do not divide (rank 1, build)"),
        ("dies:steps:1", "the process ended by SIGSEGV: something terrible (rank 1, steps)"),
        ("hangs:steps:0", "no answer from rank 0 within 3 s (steps)"),
    ],
)
def test_a_process_that_fails_is_named_and_none_is_left(tmp_path: Path, fault: str, said: str) -> None:
    group = Group(System.parse("colrow"), CASE, place(tmp_path, fault=fault))
    pids = [process.pid for process in group._processes]
    begin = time.monotonic()
    if "build" not in fault:
        group.ask("build")
    request: dict[str, Any] = {"do": "build"} if "build" in fault else {"do": "steps", "count": 1}
    if "hangs" in fault:
        group._timeout = 3.0
    with pytest.raises(SystemFailure) as raised:
        group.ask(**request)
    assert str(raised.value) == said
    group.close()
    assert time.monotonic() - begin < 50
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_with_the_benchmark(tmp_path: Path) -> None:
    """Also when it is killed: they see that nobody will ask again."""
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tests.benchmarks.test_peer_processes import CASE, place\n"
        "from benchmarks.peers.group import Group\nfrom benchmarks.peers.systems import System\n"
        f"group = Group(System.parse('colrow'), CASE, place(Path({str(tmp_path)!r})))\n"
        "group.ask('build')\nprint(*[one.pid for one in group._processes], flush=True)\ntime.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(
        Path(f"/proc/{pid}/cmdline").exists() and _alive(pid) for pid in pids
    ):
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Environment, list[str]]:
    """An environment whose commands are only written down, and the list of them."""
    steps: list[str] = []
    one = Environment(tmp_path)

    def run(what: str, command: list[str]) -> None:
        steps.append(what)
        if "virtual" in what:
            one.python.parent.mkdir(parents=True, exist_ok=True)
            one.python.touch()
        if os.environ.get("BREAK") and os.environ["BREAK"] in what:
            raise RuntimeError(what)

    monkeypatch.setattr(environment, "_run", run)
    return one, steps


def test_the_environment_is_built_once(
    installed: tuple[Environment, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, steps = installed
    monkeypatch.setenv("BREAK", "Megatron")
    with pytest.raises(RuntimeError):
        one.install()
    monkeypatch.delenv("BREAK")
    steps.clear()
    one.install()  # what was left half done is made anew
    assert len(steps) == 4
    assert "virtual" in steps[0]
    assert "colrow" in steps[3]
    steps.clear()
    one.install()
    assert steps == []
    monkeypatch.setattr(environment, "_digest_of_build", lambda: "other sources in C")
    one.install()
    assert [step for step in steps if "colrow" not in step] == []
    assert len(steps) == 1
    monkeypatch.setattr(environment, "PEERS", (*environment.PEERS, "another"))
    steps.clear()
    one.install()
    assert len(steps) == 4


def test_one_run_at_a_time_and_no_stale_locks(tmp_path: Path) -> None:
    one = Environment(tmp_path)
    lock = one.extensions / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with one.held():
        assert not lock.exists()
        with pytest.raises(RuntimeError, match="another run"), Environment(tmp_path).held():
            pass
    with one.held():
        pass
