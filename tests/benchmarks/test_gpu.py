"""The benchmark of one GPU runs on a CPU too, at small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.py"


def _measured(folder: Path, *parts: str) -> list[dict[str, object]]:
    output = folder / "gpu.json"
    options = ["--device", "cpu", "--rounds", "1", "--calls", "1", "--output", str(output)]
    command = [sys.executable, str(PROGRAM), *options, "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, object]] = json.loads(output.read_text())
    return rows


@pytest.mark.slow
def test_times(tmp_path: Path) -> None:
    rows = _measured(tmp_path, "overhead", "share", "loss")
    forms = [(row["part"], row["form"]) for row in rows]
    assert forms == [
        ("overhead", "plain"),
        ("overhead", "colrow, tp=1"),
        ("share", "whole"),
        ("share", "share"),
        ("loss", "plain"),
        ("loss", "fused"),
    ]
    assert all(isinstance(row["seconds"], float) and row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_two_ranks_on_one_device(tmp_path: Path) -> None:
    rows = _measured(tmp_path, "sharing")
    assert [row["form"] for row in rows] == ["float32", "bfloat16"]
