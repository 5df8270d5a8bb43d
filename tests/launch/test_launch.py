"""The launcher with real processes: results, every way to fail, and that nothing survives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colrow.launch import LaunchError, launch
from colrow.launch.launcher import rank_environment

LIMIT = 180.0
"""No test hangs longer, whatever fails."""
SECONDS = 60.0
"""A failure ends a run long before anybody's timeout; generous for a busy machine that loads torch thrice."""


def test_result_environment_and_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = launch(
        "tests.launch.jobs:report", {"value": 7}, 2, timeout=LIMIT, logs=tmp_path, threads_per_rank=2
    )
    assert result == {"value": 7, "total": 1.0, "threads": 2, "own session": True}
    shown = capfd.readouterr()
    assert (shown.out, _without_transport(shown.err)) == ("rank 0 speaks\n", "rank 0 warns\n")
    assert sorted((tmp_path / "rank1.log").read_text().splitlines()) == ["rank 1 speaks", "rank 1 warns"]
    assert [path.name for path in tmp_path.iterdir()] == ["rank1.log"]


def _without_transport(shown: str) -> str:
    """What rank 0 has said after the line about what the ranks communicate through, which is there once."""
    lines = shown.splitlines(keepends=True)
    assert sum(line.startswith("colrow: ranks communicate through ") for line in lines) == 1
    return "".join(line for line in lines if not line.startswith("colrow: ranks communicate through "))


def _fails(how: str, guilty: int, ranks: int) -> LaunchError:
    begin = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        launch("tests.launch.jobs:fail", {"how": how, "guilty": guilty}, ranks, timeout=LIMIT)
    assert time.monotonic() - begin < SECONDS
    return caught.value


def test_an_exception_of_one_rank(capfd: pytest.CaptureFixture[str]) -> None:
    error = _fails("raise", 1, 3)
    assert error.summary == "rank 1 of 3 failed: TypeError: boom (ranks 0 and 2 ended because of it)"
    assert (error.rank, error.exit_code) == (1, 1)
    lines = error.detail.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "jobs.py" in lines[1], "the launcher's own lines are left out"
    assert lines[-1] == "TypeError: boom"
    assert str(error).count("Traceback") == 1
    shown = _without_transport(capfd.readouterr().err)
    assert shown == "", "whatever the others have to say is not on the terminal"


def test_a_killed_rank() -> None:
    error = _fails("kill", 1, 2)
    assert error.summary == (
        "rank 1 of 2 was killed by SIGKILL, as by the operating system when memory runs out "
        "(rank 0 ended because of it)"
    )
    assert (error.rank, error.exit_code) == (1, 128 + signal.SIGKILL)
    assert "The last lines of rank 1:\nlast words" in error.detail
    assert "What the others saw of it: all_reduce 'exit mlp' did not complete on rank 0" in error.detail


def test_a_hanging_rank() -> None:
    error = _fails("hang", 1, 2)
    assert (
        "all_reduce 'exit mlp' did not complete on rank 0: rank 1 did not reach it in time" in error.summary
    )
    assert error.rank == 1
    assert "Rank 1 was here (innermost line first):" in error.detail
    assert "jobs.py" in error.detail.splitlines()[1]


def test_a_rank_that_returns_early() -> None:
    error = _fails("return", 1, 2)
    assert "rank 1 did not reach it: it has left the job" in error.summary
    assert error.summary.endswith(
        "rank 1 had returned without an error: the ranks do not make the same calls"
    )


def test_a_mistake_of_the_users_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLROW_TRACEBACK", raising=False)
    with pytest.raises(LaunchError) as caught:
        launch("tests.launch.jobs:refuse", ranks=2, timeout=LIMIT)
    assert str(caught.value) == "learning_rate must be positive, not -1"
    assert (caught.value.exit_code, caught.value.rank) == (2, None)


def test_the_whole_runs_timeout(tmp_path: Path) -> None:
    for seconds in (4, 12, 36):  # a busy machine may not even have started the rank
        folder = tmp_path / str(seconds)
        folder.mkdir()
        arguments = {"folder": str(folder), "stubborn": -1}
        with pytest.raises(LaunchError, match=f"rank 0 did not end within {seconds} s$") as caught:
            launch("tests.launch.jobs:wait_with_child", arguments, timeout=seconds)
        if caught.value.detail:
            break
    assert "in wait_with_child" in caught.value.detail
    assert (folder / "0.closed").exists()
    _assert_gone(folder, 1)


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from colrow.cli import _guard
from colrow.launch import launch
arguments = {"folder": sys.argv[1], "stubborn": int(sys.argv[2])}
sys.exit(_guard(lambda: launch("tests.launch.jobs:wait_with_child", arguments, 2)))
"""


@pytest.mark.parametrize(
    ("number", "code", "stubborn", "closed"),
    [
        (signal.SIGINT, 130, 1, ["0.closed"]),
        pytest.param(signal.SIGTERM, 143, -1, ["0.closed", "1.closed"], marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, -1, [], marks=pytest.mark.slow),
    ],
)
def test_the_launcher_is_told_to_end(
    tmp_path: Path, number: int, code: int, stubborn: int, closed: list[str]
) -> None:
    """All ranks end with it, and all that they have started, even if one ignores SIGTERM."""
    program = [sys.executable, "-c", PROGRAM, str(tmp_path), str(stubborn)]
    launcher = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    _wait_for(lambda: len(list(tmp_path.glob("*.pids"))) == 2)
    begin = time.monotonic()
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == code
    assert errors == ""
    _assert_gone(tmp_path, 2)
    assert time.monotonic() - begin < 8.0
    assert sorted(path.name for path in tmp_path.glob("*.closed")) == closed


def _wait_for(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _assert_gone(folder: Path, ranks: int) -> None:
    """No rank and no child of a rank runs, within moments."""
    numbers = [int(word) for path in folder.glob("*.pids") for word in path.read_text().split()]
    assert len(numbers) == 2 * ranks
    _wait_for(lambda: not any(_runs(number) for number in numbers))


def _runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_threads() -> None:
    """The cores are divided unless the user has decided."""
    cores = len(os.sched_getaffinity(0))
    for ranks, expected in ((1, cores), (cores, 1), (cores + 1, 1)):
        assert rank_environment({}, 0, ranks, 1, None)["OMP_NUM_THREADS"] == str(expected)
    assert rank_environment({"OMP_NUM_THREADS": "5"}, 0, 2, 1, None)["OMP_NUM_THREADS"] == "5"
    assert rank_environment({"OMP_NUM_THREADS": "5"}, 0, 2, 1, 3)["OMP_NUM_THREADS"] == "3"


def test_a_ranks_environment() -> None:
    """Its place in the job replaces that of the launcher's own; the rest is inherited."""
    inherited = {"RANK": "9", "WORLD_SIZE": "10", "PATH": "/bin", "GLOO_SOCKET_IFNAME": "eth0"}
    found = rank_environment(inherited, 1, 4, 1234, None)
    assert (found["RANK"], found["LOCAL_RANK"]) == ("1", "1")
    assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("4", "4")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", "1234")
    assert (found["PATH"], found["GLOO_SOCKET_IFNAME"]) == ("/bin", "eth0")
    assert rank_environment({}, 0, 1, 1, None)["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")


@pytest.mark.parametrize("target", ["jobs", "jobs.fail", "jobs:", ":fail", "a b:c"])
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(ValueError, match=r"target must be 'package\.module:function', not"):
        launch(target)


def test_arguments_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="cannot import the main program"):
        launch("__main__:fail")
    with pytest.raises(ValueError, match="ranks must be a whole number, at least 1, not 0"):
        launch("jobs:fail", ranks=0)
    with pytest.raises(ValueError, match="threads_per_rank must be a whole number, at least 1, not True"):
        launch("jobs:fail", threads_per_rank=True)
    with pytest.raises(ValueError, match="timeout must be positive"):
        launch("jobs:fail", timeout=0)
    with pytest.raises(ValueError, match="the arguments of jobs:fail cannot be pickled"):
        launch("jobs:fail", {"function": lambda: None})
