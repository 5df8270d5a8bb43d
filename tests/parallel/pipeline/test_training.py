"""A model in stages trains as the whole model does in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.parallel.pipeline.models import build
from tests.parallel.pipeline.training import trains_as_one
from tests.pool import Pool

Case = tuple[str, dict[str, int], dict[str, Any]]

CASES: dict[str, Case] = {
    "uneven heads": ("llama", {"pp": 2}, {}),
    "tied over stages": ("gpt2", {"pp": 2}, {"schedule": "gpipe"}),
    "a boundary in the encoder": ("t5", {"pp": 2}, {"stages": ["encoder.block.1"]}),
    "a boundary between encoder and decoder": ("t5", {"pp": 2}, {"stages": ["decoder.embed_tokens"]}),
    "a boundary in the decoder": ("t5", {"pp": 2}, {"stages": ["decoder.block.1"], "schedule": "gpipe"}),
    "an encoder": ("bert", {"pp": 2}, {}),
    "values that skip a stage": ("skips", {"pp": 2}, {"schedule": "interleaved_1f1b"}),
    "looped": ("skips", {"pp": 2}, {"schedule": "looped_bfs"}),
    "zero bubble": ("llama tied", {"pp": 2}, {"schedule": "interleaved_zero_bubble"}),
    "three stages": ("llama", {"pp": 3}, {}),
    "tensor-parallel stages": ("llama", {"pp": 2, "tp": 2}, {}),
    "a V": ("llama tied", {"pp": 2}, {"schedule": "zbv"}),
    "a V of values that skip a stage": ("skips", {"pp": 2}, {"schedule": "zbv"}),
    "a V along the sequence": ("llama", {"pp": 2, "tp": 2}, {"schedule": "zbv", "sequence": True}),
}
SLOW: dict[str, Case] = {
    "three stages, tied": ("llama tied", {"pp": 3}, {"micro_batches": 4, "schedule": "gpipe"}),
    "three stages of both": ("t5", {"pp": 3}, {}),
    "four stages with skips": ("skips", {"pp": 4}, {}),
    "tensor-parallel stages that cut the sequence": ("llama", {"pp": 2, "tp": 2}, {"sequence": True}),
    "tensor-parallel stages, zero bubble": ("llama tied", {"pp": 2, "tp": 2}, {"schedule": "zbv"}),
    "zero bubble along the sequence": (
        "llama tied",
        {"pp": 2, "tp": 2},
        {"schedule": "interleaved_zero_bubble", "sequence": True},
    ),
    "zero bubble of both": ("t5", {"pp": 2}, {"schedule": "interleaved_zero_bubble"}),
    "tensor-parallel stages of both": ("t5", {"pp": 2, "tp": 2}, {"stages": ["decoder.block.1"]}),
}


def _check(pools: Callable[[int], Pool], case: Case, data: str = "") -> None:
    name, shape, options = case
    size = 1
    for one in shape.values():
        size *= one
    held = pools(size).run(trains_as_one, name, shape, options, data, timeout=300)
    together = {key for names in held for key in names}
    assert together == {key for key, _ in build(name).named_parameters()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_stages(ranks: Callable[[int], Pool], case: Case) -> None:
    _check(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW)
def test_more_ranks(ranks: Callable[[int], Pool], case: Case) -> None:
    _check(ranks, case)


@pytest.mark.parametrize(("name", "data"), [("gpt2", "ddp"), ("gpt2", "fsdp"), ("t5", "fsdp")])
def test_replicas(ranks: Callable[[int], Pool], name: str, data: str) -> None:
    """T5 has one table in the first stage, and twice in the last."""
    stages = {"stages": ["decoder.embed_tokens"]} if name == "t5" else {}
    _check(ranks, (name, {"pp": 2, "dp": 2}, {"micro_batches": 2, **stages}), data)


def test_logits_of_a_sharded_layer(ranks: Callable[[int], Pool]) -> None:
    """FSDP asks what the last layer returns, of which a rank has a part, whether it is a view."""
    _check(ranks, ("llama", {"pp": 2, "tp": 2}, {}), "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["ddp", "fsdp"])
@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_replicas_of_schedules(ranks: Callable[[int], Pool], name: str, schedule: str, data: str) -> None:
    _check(ranks, (name, {"pp": 2, "dp": 2}, {"schedule": schedule, "micro_batches": 4}), data)
