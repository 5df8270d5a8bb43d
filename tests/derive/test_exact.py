"""Derived plans: models cut over real processes equal the original, forward, backward and after steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from colrow.plan import derive_plan
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.benchmarks.builders import load
from tests.pool import Pool, worker_mesh

FAST = [
    "gpt2:labels",
    "bert:labels",
    "llama:labels",
    "qwen3:padding",
    "gemma3:labels",
    "phi:labels",
    "opt",
    "bloom:padding",
    "falcon-groups:labels",
    "gpt-neox:labels",
    "t5:labels",
    "mixtral-loop:labels",
    "deepseek-v3:labels",
    "vit:labels",
    "whisper:labels",
    "clip",
    "mamba",
    "resnet-training",
    "transformer-encoder",
    "mlp-mixer",
    "timm-vit",
    "nano:labels",
]
SHARED = ["llama-two-groups:labels", "falcon-groups", "llama-nine-heads", "gpt2"]
"""Fewer key-value heads than ranks, uneven heads, odd sizes."""


def _verified(name: str, ranks: int, share: list[float] | None = None) -> Report:
    model, inputs = load("listed").build(name)
    examples = {"training" if model.training else "evaluation": Example((), inputs)}
    plan = derive_plan(model, examples, ranks, share=share)
    return verify_on_ranks(model, examples, worker_mesh(ranks), plan)


def _check(report: Report) -> None:
    report.raise_if_different()
    assert report.share_cut > 0.6
    assert report.plan.prediction is not None


@pytest.mark.parametrize("name", FAST)
def test_two_ranks(ranks: Callable[[int], Pool], name: str) -> None:
    _check(ranks(2).run(_verified, name, 2, timeout=120)[0])


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("size", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_more_ranks_than_units(ranks: Callable[[int], Pool], name: str, size: int) -> None:
    _check(ranks(size).run(_verified, name, size, timeout=120)[0])


@pytest.mark.parametrize("name", ["llama:labels", "gpt2"])
def test_unequal_devices(ranks: Callable[[int], Pool], name: str) -> None:
    report = ranks(3).run(_verified, name, 3, [3, 3, 2], timeout=120)[0]
    _check(report)
    features = report.plan.axes["features"].cut.counts
    assert features[0] == features[1] > features[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", load("listed").names())
@pytest.mark.parametrize("size", [2, 3])
def test_all_listed(ranks: Callable[[int], Pool], name: str, size: int) -> None:
    ranks(size).run(_verified, name, size, timeout=600)[0].raise_if_different()
