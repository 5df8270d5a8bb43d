"""The coverage benchmark on models that misbehave: every row is there, and only the good model is exact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
AWKWARD = Path(__file__).with_name("awkward_models.py")


def command(builders: Path, output: Path, *more: str) -> list[str]:
    program = [sys.executable, str(ROOT / "benchmarks" / "coverage.py"), "--builders", str(builders)]
    return [*program, "--json", str(output), *more]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "AWKWARD_PID": str(folder / "pid")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("coverage")
    arguments = command(AWKWARD, folder / "rows.json", "--timeout", "10", "--jobs", "2")
    done = subprocess.run(arguments, env=environment(folder), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "rows.json").read_text())
    return done.stdout, {row["name"]: row for row in rows}


def test_every_model_has_a_row_and_only_the_good_one_is_exact(
    run: tuple[str, dict[str, dict[str, Any]]],
) -> None:
    text, rows = run
    names = ["good", "raises", "hangs", "exits", "is killed", "cannot run", "dies in a rank", "differs"]
    assert list(rows) == names
    assert [name for name, row in rows.items() if row["exact"]] == ["good"]
    assert [name for name, row in rows.items() if not row["error"]] == ["good", "differs"]
    assert all(name in text for name in rows)
    assert "8 models: 3 run by themselves, 3 traced, 3 planned" in text
    assert "1 exact (33.3% of 3)" in text


def test_the_good_row(run: tuple[str, dict[str, dict[str, Any]]]) -> None:
    good = run[1]["good"]
    assert (good["traced"], good["planned"], good["predicted"], good["stage"]) == (True, True, True, "done")
    assert 0.5 < good["share_cut"] <= 1
    assert 0 < good["seconds"] < 10


@pytest.mark.parametrize(
    ("name", "stage", "said"),
    [
        ("raises", "build", "LookupError: no such model today"),
        ("hangs", "build", "did not end within 10 s"),
        ("exits", "build", "ended with status 7"),
        ("is killed", "build", "died of SIGKILL"),
        ("cannot run", "run", "mat1 and mat2 shapes cannot be multiplied"),
        ("dies in a rank", "verify", "the process died"),
    ],
)
def test_a_bad_row_says_what_happened_and_when(
    run: tuple[str, dict[str, dict[str, Any]]], name: str, stage: str, said: str
) -> None:
    row = run[1][name]
    assert said in row["error"]
    assert f"during {stage}" in row["error"]
    assert row["stage"] == stage
    assert row["traced"] == (stage == "verify")


def test_a_row_that_differs_says_where(run: tuple[str, dict[str, dict[str, Any]]]) -> None:
    row = run[1]["differs"]
    assert "forward" in row["first_difference"]
    assert "outputs" in row["detail"]


def test_a_file_that_cannot_say_its_names_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def names():\n    raise OSError('nothing here')\n")
    done = subprocess.run(command(broken, tmp_path / "rows.json"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "OSError: nothing here" in done.stderr
    assert not (tmp_path / "rows.json").exists()


def test_a_model_does_not_outlive_the_benchmark(tmp_path: Path) -> None:
    arguments = command(AWKWARD, tmp_path / "rows.json", "--names", "hangs", "--timeout", "600")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(arguments, env=environment(tmp_path), **quiet) as benchmark:  # type: ignore[call-overload]
        pid = tmp_path / "pid"
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.05)
        model = int(pid.read_text())
        os.kill(model, 0)
        benchmark.send_signal(signal.SIGKILL)
        benchmark.wait(30)
    while time.monotonic() < deadline and Path(f"/proc/{model}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{model}").exists()
