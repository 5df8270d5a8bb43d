"""One optimizer made of several updates as a plain one does, and takes what changes its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from colrow.optimizer_parts import OptimizerOfParts


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.rand(3, generator=generator, dtype=torch.float64)) for _ in range(4)]


def _groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:3], "weight_decay": 0.5}, {"params": parameters[3:]}]


def _of_parts(parameters: list[nn.Parameter]) -> OptimizerOfParts:
    """The second group has parameters of one part only."""
    second = {id(parameters[1]), id(parameters[2])}
    return OptimizerOfParts(
        _groups(parameters),
        {"lr": 0.1},
        [
            (lambda one: id(one) not in second, lambda groups, options: torch.optim.AdamW(groups, **options)),
            (lambda one: id(one) in second, lambda groups, options: torch.optim.AdamW(groups, **options)),
        ],
    )


def test_as_a_plain_optimizer_with_a_scheduler() -> None:
    mine, theirs = _parameters(), _parameters()
    combined, plain = _of_parts(mine), torch.optim.AdamW(_groups(theirs), lr=0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(one, 1, 0.5) for one in (combined, plain)]
    calls = []
    for step in range(3):
        for own in (mine, theirs):
            for index, one in enumerate(own):
                one.grad = torch.full_like(one, float(step + index + 1))

        def closure() -> float:
            calls.append(1)
            return 7.0

        assert combined.step(closure) == 7.0
        plain.step()
        for schedule in schedules:
            schedule.step()
    assert len(calls) == 3
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    for one, other in zip(combined.param_groups, plain.param_groups, strict=True):
        assert one.keys() == other.keys()
        assert all(one[key] == other[key] for key in one if key != "params")
        assert [len(one["params"])] == [len(other["params"])]


def test_a_part_without_parameters_is_not_made() -> None:
    parameters = _parameters()

    def fail(*_: Any) -> torch.optim.Optimizer:
        raise AssertionError

    made = OptimizerOfParts(
        _groups(parameters),
        {"lr": 0.1},
        [
            (lambda one: True, lambda groups, options: torch.optim.SGD(groups, **options)),
            (lambda one: False, fail),
        ],
    )
    assert len(made.parts) == 1


def test_what_would_lose_state_is_refused() -> None:
    combined = _of_parts(_parameters())
    with pytest.raises(ValueError, match=r"save it with colrow\.save_optimizer"):
        combined.state_dict()
    with pytest.raises(ValueError, match=r"read it with colrow\.load_optimizer"):
        combined.load_state_dict({})
    with pytest.raises(ValueError, match="make the optimizer anew"):
        combined.add_param_group({"params": _parameters()})
