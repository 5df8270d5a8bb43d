"""What of an optimizer's state has a global form, and what is refused, on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import colrow
from colrow import checkpoint
from colrow.collectives import communicator
from colrow.plan import AxisSpec, HandPlan, column, row
from tests.checkpoint.perceptron import cut, train
from tests.pool import Pool, worker_mesh


def _adafactor(size: int, hidden: int, folder: Path) -> str:
    model = cut(worker_mesh(size), hidden)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    train(model, optimizer)
    with pytest.raises(ValueError, match=r"(row|col)_var' of 0\.weight .* own shape") as caught:
        checkpoint.save_optimizer(model, optimizer, folder)
    return str(caught.value).split("has the shape")[0]


@pytest.mark.parametrize(("size", "hidden"), [(2, 6), (3, 4)])
def test_factored_moments_are_refused(
    ranks: Callable[[int], Pool], tmp_path: Path, size: int, hidden: int
) -> None:
    """With 4 hidden features over 3 ranks, two ranks' shards have the shape of a factor and one's has not."""
    assert len(set(ranks(size).run(_adafactor, size, hidden, tmp_path))) == 1
    assert not list(tmp_path.iterdir())


def _by_hand(folder: Path, case: str) -> None:
    mesh = worker_mesh(2)
    model = cut(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharded, replicated = model[0].weight, model[2].bias  # type: ignore[index]
    if case == "one kind per key":
        optimizer.state[sharded] = {"factor": torch.zeros_like(sharded)}
        optimizer.state[replicated] = {"factor": torch.zeros(2)}
        match = r"'factor' of 0\.weight .* own shape"
    elif case == "differing number":
        optimizer.state[sharded] = {"scale": torch.tensor(0.5 + communicator(mesh).rank)}
        match = r"'scale' of 0\.weight is a number that differs between the ranks"
    elif case == "state on one rank":
        if communicator(mesh).rank == 1:
            optimizer.state[sharded] = {"moment": torch.zeros_like(sharded)}
        match = "state of different parameters"
    elif case == "option on one rank":
        optimizer.param_groups[0]["lr"] = 0.1 + communicator(mesh).rank
        match = "different options"
    elif case == "not of the model":
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(5))]})
        match = r"group 1 of the optimizer has a parameter of shape \[5\] that is not in the model"
    else:
        optimizer.param_groups[0]["schedule"] = object()
        match = "option 'schedule' is a object, which cannot be saved"
    with pytest.raises(ValueError, match=match):
        checkpoint.save_optimizer(model, optimizer, folder)


@pytest.mark.parametrize(
    "case",
    [
        "one kind per key",
        "differing number",
        "state on one rank",
        "option on one rank",
        "not of the model",
        "option",
    ],
)
def test_refused_on_every_rank(ranks: Callable[[int], Pool], tmp_path: Path, case: str) -> None:
    ranks(2).run(_by_hand, tmp_path, case)
    assert not list(tmp_path.iterdir())


def _as_it_is(size: int, folder: Path, saves: bool) -> None:
    """State of a replicated parameter may have any shape; numbers stay numbers, a tensor lr a tensor."""
    model = cut(worker_mesh(size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))  # type: ignore[arg-type]
    sharded, replicated, unused = model[0].weight, model[2].bias, model[0].bias  # type: ignore[index]
    layout = colrow.state_of(model).layouts["0.weight"]
    rank = colrow.state_of(model).communicator.rank
    moment = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    states: dict[nn.Parameter, dict[str, Any]] = {
        sharded: {"moment": layout.slice(moment, rank), "count": torch.tensor(3.0)},
        replicated: {"factor": torch.tensor([1.0, 2.0]), "count": torch.tensor(4.0)},
    }
    if saves:
        optimizer.state.update(states)
        checkpoint.save_optimizer(model, optimizer, folder)
        return
    optimizer.param_groups[0]["lr"] = torch.tensor(7.0)
    optimizer.state[unused] = {"moment": torch.ones(3)}
    checkpoint.load_optimizer(model, optimizer, folder)
    assert optimizer.state.keys() == states.keys()  # what the saved one had none of is gone
    for parameter, expected in states.items():
        assert optimizer.state[parameter].keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(optimizer.state[parameter][key], value), key
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.1))


def test_state_that_is_written_as_it_is(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    ranks(2).run(_as_it_is, 2, tmp_path, True)
    for size in (1, 2, 3):
        ranks(size).run(_as_it_is, size, tmp_path, False)


def _of_another_model(folder: Path) -> None:
    mesh = worker_mesh(2)
    model = cut(mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    checkpoint.save_optimizer(model, optimizer, folder)
    other = nn.Sequential()
    other.add_module("a", nn.Linear(4, 6))
    other.add_module("b", nn.Linear(6, 4))
    plan = HandPlan({"hidden": AxisSpec()}, {"a": column("hidden"), "b": row("hidden")})
    colrow.parallelize(other, mesh, plan)
    fresh = torch.optim.AdamW(other.parameters(), lr=7.0)
    with pytest.raises(ValueError, match=r"group 0 lacks a\.weight, .* and has 0\.weight, .*does not"):
        checkpoint.load_optimizer(other, fresh, folder)
    assert fresh.param_groups[0]["lr"] == 7.0
    assert not fresh.state
    fewer = torch.optim.AdamW([model[0].weight])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"group 0 has 0\.bias, 2\.weight, 2\.bias"):
        checkpoint.load_optimizer(model, fewer, folder)
    wider = cut(mesh, 8)
    unchanged = torch.optim.AdamW(wider.parameters(), lr=7.0)
    with pytest.raises(ValueError, match=r"0\.weight\|exp_avg has the shape \[6, 4\] .* expects \[8, 4\]"):
        checkpoint.load_optimizer(wider, unchanged, folder)
    assert unchanged.param_groups[0]["lr"] == 7.0
    assert not unchanged.state


def test_state_of_another_model(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    ranks(2).run(_of_another_model, tmp_path)
