"""``colrow verify``: what it prints and returns, for models that are equal and for one that is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from colrow import cli
from colrow.plan.derive import derive_plan
from colrow.trace import Example
from tests.verify.models import bricks

BRICKS = "tests.verify.models:bricks"


def test_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    arguments = ["verify", BRICKS, "--tp", "2", "--steps", "1", "--set", "rows=3", "--json", str(file)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "Bricks: 857 parameters, training and evaluation; starting 2 ranks" in printed.err
    assert printed.out.startswith("Bricks over 2 ranks in float64")
    assert "batch 3 to 4, sequence 7 to 5" in printed.out
    assert "equal: all" in printed.out
    found = json.loads(file.read_text())
    assert found["passed"]
    assert {check["stage"] for check in found["checks"]} >= {
        "training",
        "evaluation",
        "step 1",
        "after 1 steps",
    }


def test_different(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = bricks()
    plan = derive_plan(model, {"training": Example((), inputs)}, 2)
    file = tmp_path / "plan.yaml"
    replace(plan, once_parameters=(), prediction=None).save(file)
    assert cli.main(["verify", BRICKS, "--tp", "2", "--steps", "0", "--plan", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "DIFFERENT" in printed
    assert "first difference: forward, module bricks.0 (Bare), call add at models.py:" in printed
    assert "return hidden @ self.down + self.outer" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([BRICKS, "--tp", "0"], "--tp must be a number"),
        ([BRICKS, "--tp", "2", "--set", "rows"], "--set needs NAME=VALUE"),
        ([BRICKS, "--tp", "2", "--set", "columns=3"], "cannot be called with these settings"),
        ([BRICKS, "--tp", "2", "--shrink"], "can be shrunk"),
        ([BRICKS, "--tp", "2", "--plan", "nowhere.yaml"], "there is no plan nowhere.yaml"),
        (["somewhere", "--tp", "2"], "is neither"),
        ([BRICKS, "--tp", "2", "--steps", "-1"], "steps must be at least 0"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err
