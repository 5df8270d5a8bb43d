"""The native code under the compiler's checkers, and what its build does without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "src/colrow/transport/native"
PROGRAM = Path(__file__).parent / "native/threads.c"
SOURCES = ("arena.c", "exchange.c", "group.c", "kernels.c", "kernels_x86.c", "reduce.c", "waiting.c")
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
CHECKERS = ("thread", "address,undefined")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the program, made with one of the compiler's checkers."""
    made: dict[str, Path] = {}

    def get(checker: str) -> Path:
        if checker not in made:
            program = tmp_path_factory.mktemp("native") / "threads"
            flags = ["-std=c11", "-O1", "-g", "-Wall", "-Wno-tsan", "-pthread"]
            flags += ["-fno-trapping-math", "-ffp-contract=off"]  # as in setup.py
            sources = [str(PROGRAM), *(str(NATIVE / name) for name in SOURCES)]
            command = [
                str(COMPILER),
                *flags,
                f"-fsanitize={checker}",
                f"-I{NATIVE}",
                *sources,
                "-o",
                str(program),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if (
                done.returncode
                and "sanitize" in done.stderr + " cannot find -l"
                and "error:" not in done.stderr
            ):
                pytest.skip(f"the compiler has no checker: {done.stderr[-200:]}")
            assert done.returncode == 0, done.stderr
            made[checker] = program
        return made[checker]

    return get


def _run(program: Path, ranks: int, operations: int, seed: int) -> None:
    command = [str(program), str(ranks), str(operations), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr[-4000:]


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


@needs_compiler
@pytest.mark.parametrize("checker", [CHECKERS[0], pytest.param(CHECKERS[1], marks=pytest.mark.slow)])
def test_checked_by_the_compiler(build: Callable[[str], Path], checker: str) -> None:
    """Data races between ranks; accesses outside of memory; undefined behaviour; wrong numbers."""
    for ranks, seed in ((2, 0), (3, 1), (5, 2), (64, 3)):
        _run(build(checker), ranks, 400 if ranks < 64 else 20, seed)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_checked_for_long(build: Callable[[str], Path], checker: str) -> None:
    for seed in range(30):
        _run(build(checker), 2 + seed % 7, 1500, seed)


def test_install_without_a_compiler(tmp_path: Path) -> None:
    """The build goes on without the extension, and says so."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(NATIVE, tmp_path / "src/colrow/transport/native")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = os.environ | {"CC": str(tmp_path / "no-such-compiler")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    assert "colrow.transport._native" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
