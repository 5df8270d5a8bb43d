"""What lies between regions cut along the sequence: models over real ranks equal the whole ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.plan import Plan, derive_plan
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.benchmarks.builders import load
from tests.derive.sequences import FEATURES, WIDTH, Stack, pair, plan_of, same
from tests.pool import Pool, worker_mesh

Ranks = Callable[[int], Pool]


def _verified(name: str, ranks: int) -> Report:
    model, inputs = load("listed").build(name)
    examples = {"training" if model.training else "evaluation": Example((), inputs)}
    return verify_on_ranks(model, examples, worker_mesh(ranks), sequence=True)


@pytest.mark.parametrize(
    ("name", "scattered", "whole"),
    [
        ("llama:labels", 4, 0),
        ("gpt2:labels", 4, 0),
        ("bert:labels", 3, 1),
        ("gpt-neox:labels", 2, 0),
        pytest.param("t5:labels", 10, 0, marks=pytest.mark.slow),
        ("gemma3:labels", 4, 0),
        pytest.param("mixtral-loop:labels", 4, 0, marks=pytest.mark.slow),
        ("deepseek-v3:labels", 4, 0),
    ],
)
def test_models(ranks: Ranks, name: str, scattered: int, whole: int) -> None:
    report = ranks(2).run(_verified, name, 2, timeout=120)[0]
    report.raise_if_different()
    along = [one.along for one in report.plan.exits]
    assert (len(along) - along.count(None), along.count(None)) == (scattered, whole)
    # another length, that two ranks cannot share evenly, was tried too
    assert any("sequence" in check.stage for check in report.checks)


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama-two-groups:labels", "gpt2"])
def test_uneven_parts(ranks: Ranks, name: str, size: int) -> None:
    report = ranks(size).run(_verified, name, size, timeout=120)[0]
    report.raise_if_different()
    assert all(one.along is not None for one in report.plan.exits)


def _blocks(size: int, between: str, sequence: int) -> Plan:
    original, cut = pair(lambda: Stack(between, sequence), size)
    same(original, cut, [8, 7, 5])
    return plan_of(cut)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("between", "gathered", "left"),
    [
        ("", 0, 0),
        ("flattened", 0, 0),
        ("cumulative", 2, 0),
        ("mean", 2, 0),
        ("shifted", 2, 0),
        # what computes with the length gets the whole from where that length is known
        ("length", 0, 2),
        ("positions", 0, 2),
    ],
)
def test_what_needs_the_whole_gets_it(
    ranks: Ranks, between: str, gathered: int, left: int, size: int
) -> None:
    plan = ranks(size).run(_blocks, size, between, 1)[0]
    assert sum(one.along is not None for one in plan.exits) == 4 - left
    gathers = [one for one in plan.sequence_gathers if one.gradient == "whole" and one.modules != ("",)]
    assert len(gathers) == gathered
    # what a block multiplies its parts with is computed from a parameter
    assert len([one for one in plan.partial_parameters if one.name.endswith(".scale")]) == 2 - left


def test_a_sequence_in_the_first_dimension(ranks: Ranks) -> None:
    plan = ranks(2).run(_blocks, 2, "", 0)[0]
    found = {one.module.split(".")[0]: one.along.dimension for one in plan.exits if one.along is not None}
    assert found == {"mixing": 1, "blocks": 0}


def _recomputed(size: int) -> None:
    original, cut = pair(lambda: Stack(recompute=True), size)
    same(original, cut, [8, 7, 9, 6], together=True)
    same(original, cut, [8, 5])


@pytest.mark.parametrize("size", [2, 3])
def test_recomputation_after_calls_of_other_lengths(ranks: Ranks, size: int) -> None:
    ranks(size).run(_recomputed, size)


def _kept(size: int) -> list[int]:
    """Elements that autograd keeps, without a sequence and with one."""
    found = []
    for sequence in (False, True):
        _, cut = pair(Stack, size, sequence=sequence)
        parameters = {one.data_ptr() for one in cut.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept, known: set[int] = parameters) -> Tensor:
            if tensor.data_ptr() not in known:
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = cut(torch.randn(2, 30, WIDTH, dtype=torch.float64))
        found.append(sum(kept.values()))
        result.sum().backward()
    return found


def test_less_is_kept(ranks: Ranks) -> None:
    without, along = ranks(2).run(_kept, 2)[0]
    assert along < 0.9 * without


def _counted(size: int) -> None:
    _, cut = pair(Stack, size)
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    colrow.reset_comm_stats()
    cut(x).sum().backward()
    stats = colrow.comm_stats()
    prediction = plan_of(cut).prediction
    assert prediction is not None
    for direction in ("forward", "backward"):
        for kind in ("all-reduce", "reduce-scatter", "all-gather"):
            counted = stats.where(operation=kind.replace("-", "_"), phase=direction).count
            predicted = sum(
                one.count
                for one in prediction.collectives
                if (one.mode, one.direction, one.kind) == ("training", direction, kind)
            )
            assert counted == predicted, (direction, kind)


def test_collectives_as_predicted(ranks: Ranks) -> None:
    ranks(2).run(_counted, 2)


def _generated(name: str, size: int) -> list[list[list[int]]]:
    model, inputs = load("listed").build(name)
    model.float().eval()
    original = copy.deepcopy(model)
    colrow.parallelize(model, worker_mesh(size), inputs, sequence=True)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return [one.generate(inputs["input_ids"], **options).tolist() for one in (model, original)]


def test_fewer_tokens_than_ranks_without_gradients(ranks: Ranks) -> None:
    for found, expected in ranks(3).run(_generated, "llama", 3, timeout=120):
        assert found == expected


def _dropped(size: int) -> list[float]:
    class Dropping(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = x * self.first
            for mixing in self.mixing:
                h = h + self.drop(mixing(h))
            return h

    torch.manual_seed(1)
    model = Dropping().double()
    with torch.no_grad():
        for mixing in model.mixing:
            mixing.out.bias.fill_(1.0)
    x = torch.randn(1, 64, WIDTH, dtype=torch.float64)
    colrow.parallelize(model, worker_mesh(size), {"x": x}, sequence=True)
    assert [one.module for one in plan_of(model).randomness] == ["drop"]
    result = model(torch.zeros_like(x))
    # each rank has half of the tokens: the halves would be alike if ranks drew the same numbers
    first, second = result.detach().chunk(2, 1)
    return [(first == second).double().mean().item(), float(result.detach().abs().sum())]


def test_dropout_differs_between_parts(ranks: Ranks) -> None:
    found = ranks(2).run(_dropped, 2)
    assert found[0] == found[1], "what is returned is the same on all ranks"
    assert found[0][0] < 0.8


def _file(folder: str) -> None:
    model, inputs = load("listed").build("gpt2")
    examples = {"evaluation": Example((), inputs)}
    plan = derive_plan(model, examples, 2, sequence=True)
    path = Path(folder) / f"{torch.distributed.get_rank()}.yaml"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    without = derive_plan(model, examples, 2)
    assert "to parts of sequence[1]" in without.diff(plan)
    text = plan.explain()
    assert "exit: reduce-scatter forward" in text
    assert "entry: all-gather forward" in text
    report = verify_on_ranks(model, examples, worker_mesh(2), again, steps=1)
    report.raise_if_different()


def test_plans_as_files(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(_file, str(tmp_path))


def test_nothing_to_cut() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, FEATURES), nn.ReLU(), nn.Linear(FEATURES, WIDTH))
    examples = {"training": Example((torch.randn(4, WIDTH),))}
    with pytest.raises(colrow.PlanError, match=r"no sequence can be cut.*Leave sequence=True out"):
        derive_plan(model, examples, 2, sequence=True)
    assert derive_plan(model, examples, 2, sequence="auto") == derive_plan(model, examples, 2)


@pytest.mark.parametrize(("between", "chosen"), [("", True), ("cumulative", False)])
def test_chosen_where_it_communicates_hardly_more(between: str, chosen: bool) -> None:
    examples = {"training": Example((), {"x": torch.randn(2, 64, WIDTH)})}
    plan = derive_plan(Stack(between, depth=6), examples, 2, sequence="auto")
    assert any(one.along is not None for one in plan.exits) == chosen
