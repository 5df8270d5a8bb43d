"""The builder files of the benchmarks, for tests: one source of small models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks" / "builders"


def load(name: str) -> ModuleType:
    """The builder file ``name``, without its ending."""
    specification = importlib.util.spec_from_file_location(f"builders_{name}", FOLDER / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
