"""What a model gives in objects of its own is whole, and what it reads in other ways is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.apply.check import check_plan
from colrow.plan.derive import derive_plan
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.derive.sequences import WIDTH, Block, Mixing
from tests.pool import Pool, worker_mesh

Ranks = Callable[[int], Pool]


@dataclass
class Plain:
    hidden: Any
    result: Any


@dataclass(slots=True)
class Slots:
    hidden: Any
    result: Any


class Own:
    __slots__ = ("hidden", "result")

    def __init__(self, hidden: Any, result: Any) -> None:
        self.hidden, self.result = hidden, result


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataclass": lambda hidden, result: Plain(hidden, result),
    "slots": lambda hidden, result: Slots(hidden, result),
    "own class": lambda hidden, result: Own(hidden, result),
    "namespace": lambda hidden, result: SimpleNamespace(hidden=hidden, result=result),
    "list in dataclass": lambda hidden, result: Plain([hidden], result),
    "dataclass in dictionary": lambda hidden, result: {"auxiliary": Plain(hidden, None), "result": result},
}


class Giving(nn.Module):
    """Gives what is cut within it too; ``a`` is read in a region."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 33), nn.Linear(33, 5)
        self.a = nn.Parameter(torch.tensor(1.3))
        self.form = form

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.up(x) * self.a)
        return FORMS[self.form](hidden, self.down(hidden))


class Reading(Giving):
    """Reads ``a`` in another way."""

    def __init__(self, way: str) -> None:
        super().__init__("namespace")
        self.way, self.kept = way, [self.a]

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "list":
            a: Tensor = self.kept[0]
        elif self.way == "named":
            a = dict(self.named_parameters())["a"]
        else:
            found = self._parameters["a"]
            assert found is not None
            a = found
        result: Tensor = self.down(torch.tanh(self.up(x) * a))
        return result


def _verify(size: int, build: Callable[[], nn.Module], sequence: bool = False) -> Report:
    example = Example((torch.rand(3, 7, WIDTH if sequence else 6),))
    return verify_on_ranks(build, example, worker_mesh(size), steps=1, sequence=sequence)


@pytest.mark.parametrize("form", FORMS)
def test_objects_hold_wholes(ranks: Ranks, form: str) -> None:
    for report in ranks(2).run(_verify, 2, partial(Giving, form)):
        assert report.passed, str(report)
        assert report.share_cut > 0.9
        kinds = [check.kind for check in report.checks]
        assert kinds.count("outputs") >= 4
        assert kinds.count("gradients") >= 10
        assert "cache" not in kinds


@pytest.mark.parametrize("way", ["list", "named", "dictionary"])
def test_parameters_that_are_no_attributes_where_they_are_read(ranks: Ranks, way: str) -> None:
    for report in ranks(2).run(_verify, 2, partial(Reading, way)):
        assert report.passed, str(report)
        assert any("a is not read as an attribute" in note for note in report.plan.notes), report.plan.notes


class Writing(nn.Module):
    """One token is changed where it lies, by an operation on a view of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.ModuleList(Mixing(1) for _ in range(2))
        self.blocks = nn.ModuleList(Block("") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[0](x + self.mixing[0](x))
        y[:, 0] = y[:, 0] * 2
        result: Tensor = self.blocks[1](y + self.mixing[1](y))
        return result


def test_writing_along_a_sequence(ranks: Ranks) -> None:
    for report in ranks(2).run(_verify, 2, Writing, True):
        assert report.passed, str(report)


def _layers(count: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block("") for _ in range(count)))


@pytest.mark.parametrize("count", [1, 3])
def test_a_plan_for_another_number_of_layers(count: int) -> None:
    plan = derive_plan(_layers(2), {"training": Example((torch.rand(2, 3, WIDTH),))}, 2)
    with pytest.raises(colrow.PlanError, match=r"made for another model, \d+ parameters or buffers differ"):
        check_plan(plan, _layers(count))


def _different_plans() -> None:
    mesh = worker_mesh(2)
    forbid = ["0.up.weight"] if mesh.get_local_rank("tp") else []
    with pytest.raises(colrow.PlanError, match="rank 1 has another plan than rank 0"):
        colrow.parallelize(_layers(2), mesh, (torch.rand(2, 3, WIDTH),), forbid=forbid)


def test_plans_that_differ_between_ranks(ranks: Ranks) -> None:
    ranks(2).run(_different_plans)


def _bare_tensor() -> None:
    model = colrow.parallelize(_layers(2), worker_mesh(2), torch.rand(2, 3, WIDTH))
    assert colrow.state_of(model).plan.parameters


def test_an_example_that_is_a_tensor(ranks: Ranks) -> None:
    ranks(2).run(_bare_tensor)
