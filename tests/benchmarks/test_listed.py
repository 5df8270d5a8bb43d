"""The listed models: they build, they run, all their operators are known, and most of each may be cut."""

from __future__ import annotations

import math

import pytest
import torch

from colrow.axes import infer
from colrow.trace import trace
from tests.benchmarks.builders import load

listed = load("listed")
NAMES = [name for name in listed.names() if not name.startswith("smollm2")]
SHARE = 0.9


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_is_known_and_most_may_be_cut(name: str) -> None:
    model, inputs = listed.build(name)
    axes = infer(trace(model, (), inputs, routing="guess"))
    assert axes.unknown == {}
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    cut = {n for axis in axes.all if axis.legal for n, _ in axis.parameters}
    assert sum(sizes[n] for n in cut) > SHARE * sum(sizes.values())


@pytest.mark.parametrize("name", ["llama:labels", "mlp-mixer", "expert-loop", "mamba2"])
def test_building_twice_gives_the_same_numbers(name: str) -> None:
    runs = []
    for _ in range(2):
        model, inputs = listed.build(name)
        output = model(**inputs)
        runs.append(output if isinstance(output, torch.Tensor) else output[0])
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert torch.equal(*runs)
    assert math.isfinite(runs[0].abs().sum().item())
