"""The ``colrow`` command: help, mistakes, and errors as one line and an exit status."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest

from colrow import PlanError, cli
from colrow.launch import LaunchError


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], None]:
    """Puts a function in the place of ``colrow train``."""
    monkeypatch.delenv("COLROW_TRACEBACK", raising=False)

    def replace(run: Callable[[list[str]], int]) -> None:
        module: Any = types.ModuleType("colrow.cli.train")
        module.run = run
        monkeypatch.setitem(sys.modules, "colrow.cli.train", module)

    return replace


Train = Callable[[Callable[[list[str]], int]], None]


def _raises(error: BaseException) -> Callable[[list[str]], int]:
    def run(arguments: list[str]) -> int:
        raise error

    return run


def test_the_command_gets_its_arguments_and_its_status_is_returned(train: Train) -> None:
    seen: list[str] = []

    def run(arguments: list[str]) -> int:
        seen.extend(arguments)
        return 3

    train(run)
    assert cli.main(["train", "a.yaml", "--help"]) == 3
    assert seen == ["a.yaml", "--help"]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: colrow COMMAND")
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: colrow COMMAND")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "did you mean train?"),
        ("generat", "did you mean generate?"),
        ("--hepl", f"there are {', '.join(cli.COMMANDS)}"),
        ("xyz", f"there are {', '.join(cli.COMMANDS)}"),
    ],
)
def test_unknown_commands(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == f"colrow: there is no command {name!r}: {hint}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("tp must be 2"), "tp must be 2"),
        (PlanError("mlp", "cause", "Do this."), "mlp: cause. Do this."),
        (FileNotFoundError(2, "No such file", "a.yaml"), "[Errno 2] No such file: 'a.yaml'"),
        (
            ModuleNotFoundError("No module named 'transformers'", name="transformers"),
            "the package transformers is not installed: pip install 'colrow[hf]'",
        ),
    ],
)
def test_mistakes_are_one_line(
    train: Train,
    error: Exception,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(_raises(error))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == f"colrow: {line}\n"
    monkeypatch.setenv("COLROW_TRACEBACK", "1")
    assert cli.main(["train"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.endswith(f"colrow: {line}\n")


def test_errors_of_the_programs_own_keep_their_traceback(train: Train) -> None:
    train(_raises(ModuleNotFoundError("No module named 'colrow.nowhere'", name="colrow.nowhere")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train"])
    train(_raises(KeyError("x")))
    with pytest.raises(KeyError):
        cli.main(["train"])


def test_failed_ranks(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(_raises(LaunchError("rank 1 of 2 failed", "its traceback", 137, 1)))
    assert cli.main(["train"]) == 137
    assert capsys.readouterr().err == "its traceback\n\ncolrow: rank 1 of 2 failed\n"


def test_interrupted(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(_raises(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130
    assert capsys.readouterr() == ("", "")


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "colrow", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"colrow {metadata.version('colrow')}\n")


def test_output_that_nobody_reads_to_its_end() -> None:
    printing = "[print(number) for number in range(100_000)] and 0"
    program = (
        f"from colrow import cli; cli._find = lambda name: lambda rest: {printing}; exit(cli.main(['plan']))"
    )
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    assert writer.stdout.readline() == b"0\n"
    writer.stdout.close()
    assert writer.wait(60) == 128 + 13
    assert writer.stderr.read() == b""
