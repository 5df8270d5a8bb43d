"""A model in stages trains as the whole model does in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import colrow
from colrow.errors import PlanError
from tests.parallel.pipeline.models import build, example_of
from tests.parallel.pipeline.training import trains_as_one
from tests.pool import Pool, worker_mesh

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
}
SLOW: dict[str, Case] = {
    "three stages, tied": ("llama tied", {"pp": 3}, {"micro_batches": 4, "schedule": "gpipe"}),
    "three stages of both": ("t5", {"pp": 3}, {}),
    "four stages with skips": ("skips", {"pp": 4}, {}),
    "tensor-parallel stages that cut the sequence": ("llama", {"pp": 2, "tp": 2}, {"sequence": True}),
    "tensor-parallel stages, zero bubble": ("llama tied", {"pp": 2, "tp": 2}, {"schedule": "zbv"}),
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


def _zero_bubble_of_several_values() -> str:
    with pytest.raises(PlanError) as raised:
        colrow.pipeline_parallel(
            build("t5"),
            worker_mesh(tp=1, pp=2),
            example_of("t5"),
            schedule="interleaved_zero_bubble",
            micro_batches=2,
        )
    return str(raised.value)


def test_zero_bubble_takes_one_value(ranks: Callable[[int], Pool]) -> None:
    """torch computes the gradients of each received value by itself, through graphs that they share."""
    for message in ranks(2).run(_zero_bubble_of_several_values):
        assert "values pass between stages here, and interleaved_zero_bubble takes one" in message


def _zero_bubble_along_a_sequence() -> str:
    mesh = worker_mesh(tp=2, pp=2)
    model = colrow.parallelize(build("llama"), mesh, example_of("llama"), sequence=True)
    with pytest.raises(PlanError) as raised:
        colrow.pipeline_parallel(model, mesh, example_of("llama"), schedule="zbv", micro_batches=4)
    return str(raised.value)


def test_zero_bubble_takes_no_parts_of_sequences(ranks: Callable[[int], Pool]) -> None:
    for message in ranks(4).run(_zero_bubble_along_a_sequence):
        assert "zbv divides backward passes" in message
        assert "sequence=False" in message


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
