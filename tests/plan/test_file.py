"""Plans as files: read back exactly, readable, and refused with the entry at fault."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from colrow import PlanError
from colrow.plan import Plan
from colrow.plan.file import dumps, loads
from tests.plan.samples import everything, gpt2
from tests.plans import hand_plan

transformers = pytest.importorskip("transformers")


def test_every_field_comes_back(tmp_path: Path) -> None:
    plan = everything()
    empty = [field.name for field in dataclasses.fields(plan) if not getattr(plan, field.name)]
    assert empty == [], "the sample has everything"
    plan.save(tmp_path / "plan.yaml")
    again = Plan.load(tmp_path / "plan.yaml")
    assert again == plan
    for field in ("axes", "parameters", "shapes"):
        assert list(getattr(again, field)) == list(getattr(plan, field)), "and in the same order"


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_hand_plans_come_back(ranks: int) -> None:
    plan = gpt2(ranks)
    assert loads(dumps(plan)) == plan
    assert loads(dumps(Plan(ranks))) == Plan(ranks)


def test_a_file_for_126_layers_is_as_long_as_one_for_four() -> None:
    def length(layers: int) -> int:
        with torch.device("meta"):
            config = transformers.LlamaConfig(num_hidden_layers=layers, num_key_value_heads=8)
            model = transformers.LlamaForCausalLM(config)
        plan = hand_plan(model).resolve(model, 8)
        text = dumps(plan)
        assert loads(text) == plan
        return text.count("\n")

    assert length(126) == length(4) < 70


def test_the_file_can_be_edited() -> None:
    text = dumps(gpt2(2))
    assert text.startswith("# A plan of colrow")
    line = "- {name: heads, cut: [3, 3], fitted: [3, 3]}"
    assert line in text
    edited = loads(text.replace(line, "- {name: heads, cut: [4, 2], fitted: [3, 3]}"))
    assert edited.axes["heads"].cut.counts == (4, 2)
    assert edited.axes["heads"].fitted == (3, 3), "the attribute split_size depends on it"
    text = text.replace("- repeat: 0-3", "- repeat: 0, 2-3", 1)
    assert "transformer.h.1.attn.c_attn.weight" not in loads(text).parameters


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ranks: 2", "ranks: two", "ranks must be of type int, not 'two'"),
        ("ranks: 2\n", "", "the plan lacks the entry 'ranks'"),
        ("axes:", "axis:", "no entry 'axis', did you mean axes?"),
        ("cut: [3, 3]", "cut: [3, -3]", "boundaries of a cut must not decrease"),
        ("cut: [3, 3]", "cuts: [3, 3]", "axes heads has no entry 'cuts', did you mean cut?"),
        ("dimension: 1", "dimension: one", "must be of type int, not 'one'"),
        ("layout: 1x6x8", "layout: 6x8", "'6x8' is no part of a layout"),
        ("- repeat: 0-3", "- repeat: 0..3", "repeat must be numbers"),
        ("input: transformer", "inputs: transformer", "must name a place by one of input, output"),
        ("axes:", "axes: {", "this is not YAML"),
    ],
)
def test_mistakes_are_named(old: str, new: str, message: str) -> None:
    text = dumps(gpt2(2))
    assert old in text
    with pytest.raises(PlanError, match=message) as caught:
        loads(text.replace(old, new, 1), "plan.yaml")
    assert caught.value.module == "plan.yaml"


def test_a_call_that_is_not_there() -> None:
    text = dumps(everything())
    assert "call: view@31" in text
    with pytest.raises(PlanError, match=r"there is no call 'view@32' among the calls"):
        loads(text.replace("call: view@31", "call: view@32", 1))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="this is no plan"):
        loads("just words")
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "plan.yaml")
