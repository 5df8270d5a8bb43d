"""Plans from files that were edited, or are of another program: right, or an error that says what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow import PlanError
from colrow.apply.calls import check_call
from colrow.apply.check import check_plan
from colrow.plan import Plan, derive_plan
from colrow.plan.file import dumps, loads
from colrow.plan.places import Call
from colrow.trace import Example
from tests.derive.test_use import WIDTH, Heads, _gradients_differ, _input
from tests.pool import Pool, worker_mesh


class Split(nn.Module):
    """Four heads that an attribute counts, and features after them that no number counts."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.o = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = torch.softmax(self.q(x).view(batch, tokens, self.heads, 6), -1)
        hidden = self.o(heads.view(batch, tokens, self.heads * 6))
        return self.down(torch.relu(self.up(hidden)))


def _text(module: type[nn.Module]) -> str:
    return dumps(colrow.derive_plan(module().double(), _input_of(), 2))


def _input_of() -> dict[str, Example]:
    return {"training": Example((_input(),)), "evaluation": Example((_input(),))}


def _edited(text: str, *changes: tuple[str, str]) -> Plan:
    for old, new in changes:
        assert old in text, text
        text = text.replace(old, new)
    return loads(text)


def _apply(module: type[nn.Module], plan: Plan, check: bool = False) -> None:
    """Equal to the original, in outputs and all gradients."""
    torch.manual_seed(0)
    original = module().double()
    cut = copy.deepcopy(original)
    options = {"check": (_input(),)} if check else {}
    colrow.parallelize(cut, worker_mesh(2), plan, **options)  # type: ignore[arg-type]
    cotangent = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    outputs = [model(_input()) for model in (original, cut)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)
    for output in outputs:
        output.backward(cotangent)
    assert not _gradients_differ(cut, original)


def _right_edits() -> None:
    text = _text(Split)
    assert "features_2, cut: [2, 2], fitted: [2, 2]" in text
    assert "features, cut: [4, 3]}" in text, text
    for check in (False, True):
        _apply(Split, _edited(text), check)
        # no number depends on these
        _apply(Split, _edited(text, ("features, cut: [4, 3]", "features, cut: [1, 6]")), check)
        changes = (
            ("features_2, cut: [2, 2], fitted: [2, 2]", "features_2, cut: [3, 1], fitted: [3, 1]"),
            ("attribute: heads, values: [2, 2]", "attribute: heads, values: [3, 1]"),
        )
        _apply(Split, _edited(text, *changes), check)


def _wrong_edits() -> None:
    cut = ("cut: [2, 2]", "cut: [3, 1]")
    forgotten = r"features.*: this axis is cut \[3, 1\], but .* worked out for \[2, 2\].*share="
    for module in (Split, Heads):
        with pytest.raises(PlanError, match=forgotten):
            _apply(module, _edited(_text(module), cut))
    # what it was fitted to was edited along, the number was not
    plan = _edited(_text(Split), cut, ("fitted: [2, 2]", "fitted: [3, 1]"))
    with pytest.raises(PlanError, match=r"under this plan rank \d raises RuntimeError: shape"):
        _apply(Split, plan, check=True)
    plan = _edited(_text(Heads), ("values: [2, 2]", "values: [2]"))
    with pytest.raises(PlanError, match=r"has 1 numbers for 2 ranks"):
        _apply(Heads, plan)


class Matrices(nn.Module):
    """No layers: the partial sum is reduced at a call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(24, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up.t()) @ self.down + x


def _stale() -> None:
    """A call that is not made, in code that is not found by its name: without an example nobody notices."""
    text = _text(Matrices)
    _apply(Matrices, loads(text), check=True)
    plan = _edited(text, ("code: Matrices.forward", "code: Matrices.of_another_release"))
    with pytest.raises(PlanError, match=r"matmul in tests.derive.test_edited_plans:\d+ .*no example passes"):
        _apply(Matrices, plan, check=True)


def _outer() -> None:
    def inner(x: Tensor) -> Tensor:
        return x.view(-1)


def test_calls_in_functions_within_functions() -> None:
    code = next(one for one in _outer.__code__.co_consts if isinstance(one, CodeType))
    line = code.co_firstlineno + 1
    start = next(start for start, _, number in code.co_lines() if number == line)
    there = Call("view", __name__, code.co_qualname, line, start)
    check_call(there, "module")
    check_call(replace(there, code="somebody.<locals>.inner"), "module")  # nobody knows where to look
    for other in (replace(there, line=line + 1), replace(there, code="_outer.<locals>.gone")):
        with pytest.raises(PlanError, match=r"module: the plan changes view in .* is not there any more"):
            check_call(other, "module")


def _refused_on_all_ranks() -> None:
    plan = _edited(_text(Split), ("values: [2, 2]", "values: [2, 1]"))
    with pytest.raises(PlanError) as caught:
        _apply(Split, plan, check=True)
    rank = torch.distributed.get_rank()
    assert ("rank 1 raises RuntimeError" if rank else "rank 1 cannot run under this plan") in str(
        caught.value
    )


@pytest.mark.parametrize("work", [_right_edits, _wrong_edits, _stale, _refused_on_all_ranks])
def test_edited(ranks: Callable[[int], Pool], work: Callable[[], None]) -> None:
    ranks(2).run(work)


def test_saved(tmp_path: Path) -> None:
    plan = colrow.derive_plan(Split().double(), _input_of(), 2)
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    assert {axis.name: axis.fitted for axis in plan.axes.values()} == {"features_2": (2, 2), "features": ()}


class Normalised(nn.Module):
    """What its width is normalised over stands in a note, with the place in torch's code."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.matrices = nn.LayerNorm(WIDTH), Matrices()

    def forward(self, x: Tensor) -> Tensor:
        return self.matrices(self.norm(x))


def test_files_do_not_depend_on_where_things_are_installed() -> None:
    text = _text(Normalised)
    assert "(aten.native_layer_norm in norm, torch/nn/modules/normalization.py:" in text
    for folder in (Path(torch.__file__).parents[1], Path(__file__).parents[2]):
        assert str(folder) not in text


def test_a_plan_of_another_size_is_refused_with_the_difference() -> None:
    def model(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))

    plan = derive_plan(model(60), {"training": Example((torch.randn(2, 8),))}, 2)
    with pytest.raises(PlanError, match=r"0.weight differs \(60 x 8 in the plan, 50 x 8 in the model\)"):
        check_plan(plan, model(50))


@pytest.mark.parametrize(
    ("counts", "cause"),
    [
        ("[4, 4]", "its cut [4, 4] adds up to 8 units, and dimension 0 of up.weight has 7 of them"),
        ("[3, 3]", "adds up to 6 units"),
        ("[3, 2, 2]", "its cut [3, 2, 2] is for 3 ranks, and the plan for 2"),
    ],
)
def test_a_cut_deals_out_all_units_to_all_ranks(counts: str, cause: str) -> None:
    text = dumps(colrow.derive_plan(Split().double(), _input_of(), 2))
    with pytest.raises(PlanError) as raised:
        check_plan(_edited(text, ("[4, 3]", counts)), Split())
    assert cause in raised.value.cause
    assert raised.value.module == "features"


@pytest.mark.parametrize(
    ("examples", "cause"),
    [
        ({"x": _input()}, "'x' is no colrow.trace.Example"),
        ((_input(),), "'examples' is no"),
        (Example((_input(),)), "'examples' is no"),
        ({}, "no call is given"),
    ],
)
def test_calls_are_given_by_mode(examples: Any, cause: str) -> None:
    with pytest.raises(PlanError, match="calls of the model by mode") as raised:
        derive_plan(Split(), examples, 2)
    assert cause in raised.value.cause
    assert '{"training": Example(' in raised.value.remedy
