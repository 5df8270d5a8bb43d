"""The virtual environment in which all systems are installed side by side: built once, then kept.

Only the standard library is used here: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".peers"
"""It tells git to ignore it, and ``make clean`` removes it."""
CONSTRAINTS = ROOT / "constraints.txt"
TORCH = ("torch==2.13.0",)
PEERS = (
    "megatron-core==0.16.1",
    "transformers==5.23.0",
    "deepspeed==0.19.8",
    "accelerate",
    "matplotlib",
    "ninja",  # DeepSpeed compiles with it
    "safetensors",
)
BUILT_FROM = ("pyproject.toml", "setup.py", "src/colrow/**/*.c", "src/colrow/**/*.h")
"""What an editable installation of colrow does not follow by itself."""


class Environment:
    """A folder with the virtual environment, what is compiled for it, and the models' weights.

    Attributes:
        python: its interpreter.
        models: where weights are written.
        extensions: where DeepSpeed's operators are compiled, apart from anybody else's.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.python = folder / "environment" / "bin" / "python"
        self.models = folder / "models"
        self.extensions = folder / "extensions"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs away: two at a time would measure each other.

        Raises:
            RuntimeError: if another run holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ".gitignore").write_text("*\n")
        with (self.folder / "held").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(f"another run of this benchmark is using {self.folder}") from error
            self.remove_stale_locks()
            yield

    def remove_stale_locks(self) -> None:
        """Remove what a killed compilation left: the next one would wait for it for ever."""
        for lock in self.extensions.glob("**/lock"):
            lock.unlink(missing_ok=True)

    def install(self) -> None:
        """Install what is missing, and colrow from this checkout.

        Raises:
            RuntimeError: if a step fails, with the end of what it printed.
        """
        stamps = self.folder / "installed.json"
        wanted = {"peers": self._peers(), "colrow": _digest_of_build()}
        done = json.loads(stamps.read_text()) if stamps.exists() and self.python.exists() else {}
        if done.get("peers") != wanted["peers"]:
            stamps.unlink(missing_ok=True)
            _run("making a virtual environment", [sys.executable, "-m", "venv", "--clear", str(self._home)])
            # torch first, by itself: the others ask for it in ranges, and would get a build for GPUs
            self._pip("installing torch", *TORCH)
            self._pip("installing Megatron core, transformers, DeepSpeed", *TORCH, *PEERS)
            done = {"peers": wanted["peers"]}
            stamps.write_text(json.dumps(done))
        if done.get("colrow") != wanted["colrow"]:
            self._pip("installing colrow from this checkout", "--no-deps", "--editable", str(ROOT))
            stamps.write_text(json.dumps(wanted))

    def variables(self) -> dict[str, str]:
        """Environment variables for everything that runs in it."""
        return {"TORCH_EXTENSIONS_DIR": str(self.extensions), "PATH": _path_with(self.python.parent)}

    @property
    def _home(self) -> Path:
        return self.python.parents[1]

    def _pip(self, what: str, *arguments: str) -> None:
        pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check"]
        _run(what, [*pip, "--constraint", str(CONSTRAINTS), *arguments])

    def _peers(self) -> str:
        return _digest([sys.version, *TORCH, *PEERS, CONSTRAINTS.read_text()])


class Existing(Environment):
    """The running interpreter, with whatever it has; for trials and tests."""

    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__(folder)
        self.python = Path(sys.executable)

    def install(self) -> None:
        """Nothing: what is not there is a system's error."""


def versions(python: Path) -> dict[str, str]:
    """What is installed of what the numbers depend on."""
    names = ("colrow", "torch", "megatron-core", "transformers", "deepspeed")
    program = (
        "import importlib.metadata as m, json\n"
        "found = {}\n"
        f"for name in {names!r}:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def processor() -> str:
    """Its name, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _digest_of_build() -> str:
    files = sorted(path for pattern in BUILT_FROM for path in ROOT.glob(pattern))
    return _digest([str(ROOT), *(path.read_text(errors="replace") for path in files)])


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)])


def _run(what: str, command: Sequence[str]) -> None:
    print(f"{what} ...", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-20:])
        raise RuntimeError(f"{what} failed: {' '.join(command)}\n{end}")
