"""Files are named alike on every machine."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama import modeling_llama

from colrow.sources import short_path, source_of

LLAMA = inspect.getsourcefile(modeling_llama) or ""


def test_modules() -> None:
    assert source_of(LLAMA) == "transformers.models.llama.modeling_llama"
    assert source_of("/somewhere/program.py") == "program.py"


def test_packages() -> None:
    assert short_path(LLAMA) == "transformers/models/llama/modeling_llama.py"
    assert short_path(torch.nn.__file__) == "torch/nn/__init__.py"
    assert short_path(inspect.__file__) == "inspect.py"


def test_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "experiments" / "program.py"
    assert short_path(str(program)) == "program.py"
    monkeypatch.chdir(tmp_path)
    assert short_path(str(program)) == "experiments/program.py"
    monkeypatch.setattr(sys, "path", [*sys.path, str(program.parent)])
    assert short_path(str(program)) == "program.py"
    assert short_path("<string>") == "<string>"
    assert short_path("program.py") == "program.py"
