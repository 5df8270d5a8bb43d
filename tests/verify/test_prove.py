"""``verify`` starts its own ranks: modules and functions are sent to them, also those of the main program."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from colrow.launch import LaunchError, launch
from colrow.plan import AxisSpec, HandPlan, column, row
from colrow.verify import Report, verify

PERCEPTRON = HandPlan(
    axes={"features": AxisSpec()}, styles={"first": column("features"), "second": row("features")}
)


class Perceptron(nn.Module):
    """Refuses negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 11)
        self.second = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        if not (x >= 0).all():
            raise ValueError("no negative numbers, please")
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


def test_a_module_on_ranks_of_its_own() -> None:
    torch.manual_seed(4)
    model = Perceptron()
    weight = model.first.weight.detach().clone()
    report = verify(model, {"x": torch.rand(4, 6)}, 3, PERCEPTRON, timeout=120)
    assert report.passed, str(report)
    assert report.model == "Perceptron"
    assert report.plan.axes["features"].cut.counts == (4, 4, 3)
    assert torch.equal(model.first.weight, weight)


def test_an_original_that_cannot_be_run() -> None:
    with pytest.raises(
        LaunchError, match=r"the original model raised, training, forward: .*no negative"
    ) as caught:
        verify(Perceptron, {"x": -torch.rand(4, 6)}, 2, PERCEPTRON, timeout=120)
    assert caught.value.exit_code == 2


def test_what_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="cannot be sent to the ranks"):
        verify(lambda: Perceptron(), {"x": torch.rand(4, 6)}, 2, PERCEPTRON)


def test_a_rank_does_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="this process is one of several ranks"):
        verify(Perceptron, {"x": torch.rand(4, 6)}, 2, PERCEPTRON)


def test_a_rank_that_raises_alone_is_no_hang() -> None:
    start = time.monotonic()
    report: Report = launch("tests.verify.jobs:raise_on_one_rank", ranks=2, threads_per_rank=1, timeout=120)
    assert time.monotonic() - start < 60
    assert [check.name for check in report.failed] == ["the parallelized model raised"]
    difference = report.difference
    assert difference is not None
    assert (difference.direction, difference.module) == ("forward", "bricks.1")
    assert "on rank 1" in difference.detail
    assert "ArithmeticError: this rank has had enough" in difference.detail


PROGRAM = """
import torch
from torch import nn
from colrow.plan import AxisSpec, HandPlan, column, row
from colrow.verify import verify


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 11), nn.Linear(11, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


if __name__ == "__main__":
    plan = HandPlan({"all": AxisSpec()}, {"first": column("all"), "second": row("all")})
    print(verify(Mine, {"x": torch.rand(4, 6)}, 2, plan, steps=1, timeout=120))
"""


@pytest.mark.slow
def test_a_model_of_the_main_program(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=200)
    assert "equal: all" in done.stdout, done.stderr
    assert done.stdout.startswith("Mine over 2 ranks in float64")
