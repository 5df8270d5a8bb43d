"""What a pipeline does besides computing right: what it refuses, reports, leaves alone and gives up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import colrow
from colrow.checkpoint import parameters_on_meta
from tests.apply.comparison import largest_error
from tests.parallel.pipeline.models import IGNORED, batch_of, build, example_of, parts_of
from tests.parallel.pipeline.training import make, optimizer_of, tokens_of
from tests.pool import Pool, worker_mesh


def _refusals() -> None:
    mesh = worker_mesh(1, 1, 2)
    model, example = build("llama"), example_of("llama")

    def cut(**options: Any) -> colrow.Pipeline:
        return colrow.pipeline_parallel(model, mesh, example, **options)

    with pytest.raises(ValueError, match=r"the mesh has no stages: make it with colrow.init_mesh"):
        colrow.pipeline_parallel(model, worker_mesh(2), example)
    with pytest.raises(
        colrow.PlanError, match="1f1b needs at least as many micro-batches as stages: 2, not 1"
    ):
        cut(micro_batches=1)
    with pytest.raises(colrow.PlanError, match="a batch cannot have 'four' micro-batches"):
        cut(micro_batches="four")
    with pytest.raises(colrow.PlanError, match="the ranks would cut the model into different stages"):
        cut(stages=[f"model.layers.{1 + torch.distributed.get_rank()}"])
    assert len(dict(model.named_parameters())) == len(dict(build("llama").named_parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.distributed.get_rank())
    with pytest.raises(colrow.PlanError, match="the ranks hold different weights"):
        cut()

    model = build("llama")
    pipeline = cut()
    with pytest.raises(colrow.PlanError, match="the model is in a pipeline already"):
        cut()
    with pytest.raises(ValueError, match="a rank of a pipeline has some layers of this model only"):
        colrow.unshard(pipeline)
    with pytest.raises(colrow.PlanError, match="it computes on another rank of the pipeline"):
        model(**example)
    with pytest.raises(RuntimeError, match="a pipeline is called for evaluation"):
        pipeline(**example)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"call it outside of torch.no_grad\(\)"):
        pipeline.step(batch_of("llama"))
    with pytest.raises(ValueError, match="a batch of 2 rows cannot be divided into 4 equal micro-batches"):
        pipeline.step(example)
    ignored = batch_of("llama")
    ignored["labels"] = torch.full_like(ignored["labels"], IGNORED)
    with pytest.raises(ValueError, match="no label of this batch counts"):
        pipeline.step(ignored)
    pipeline.step(batch_of("llama"))  # nothing of this is left behind


def test_what_is_refused(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_refusals)


def _reports() -> tuple[colrow.parallel.pipeline.PipelineReport, int, int]:
    pipeline = make("llama", {"pp": 2}, micro_batches=4, stages=["model.layers.1"])
    pipeline.step(batch_of("llama"))
    count = colrow.count_parameters(pipeline)
    own = sum(one.untyped_storage().nbytes() for one in pipeline.parameters())
    return pipeline.report(), own, count.local_bytes


def test_reports_and_memory(ranks: Callable[[int], Pool]) -> None:
    (first, own, expected), (last, *_) = ranks(2).run(_reports)
    assert first.stages == ("model.embed_tokens to model.layers.0",)
    assert last.stages == ("model.layers.1 to lm_head",)
    assert first.idle_share == 0.2
    assert 0 <= first.waited_share <= 1
    # rows, length, features, bytes of an element: forward, and the gradients back
    assert first.bytes_sent == last.bytes_sent == 8 * 9 * 20 * 8
    assert own == expected


def _on_meta() -> None:
    with parameters_on_meta():
        model = build("llama")
    pipeline = colrow.pipeline_parallel(model, worker_mesh(1, 1, 2), example_of("llama"))
    assert all(parameter.is_meta for parameter in pipeline.parameters())
    count = colrow.count_parameters(pipeline)
    assert count.local < count.total == sum(one.numel() for one in build("llama").parameters())


def test_models_on_meta(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_on_meta)


def _accumulates(name: str, data: str) -> None:
    """Two steps of a pipeline before one of the optimizer are one step with both batches."""
    pipeline = make(name, {"pp": 2, "dp": 2}, data, micro_batches=2)
    mesh = colrow.state_of(pipeline).mesh
    own = parts_of(pipeline, batch_of(name, 2, 16), 2)[mesh.get_local_rank("dp")]
    weight = colrow.token_weight(mesh, tokens_of(name, own))
    halves = parts_of(pipeline, own, 2)
    with colrow.no_gradient_sync(pipeline):
        pipeline.step(halves[0], weight * tokens_of(name, halves[0]))
    pipeline.step(halves[1], weight * tokens_of(name, halves[1]))
    norm = colrow.clip_grad_norm_(pipeline, math.inf)
    whole = build(name)
    whole(**batch_of(name, 2, 16))["loss"].backward()
    expected = nn.utils.clip_grad_norm_(whole.parameters(), math.inf)
    assert math.isclose(norm, expected, rel_tol=1e-9)
    optimizer_of(pipeline).step()
    colrow.check_replicas(pipeline)


@pytest.mark.parametrize("data", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_accumulation(ranks: Callable[[int], Pool], data: str) -> None:
    ranks(4).run(_accumulates, "gpt2", data)


def _checkpoints() -> None:
    """Activation checkpointing of each layer, and a schedule that divides backward passes."""
    pipeline = make("llama", {"pp": 2}, schedule="interleaved_zero_bubble")
    pipeline.step(batch_of("llama"))
    expected = {name: one.grad.clone() for name, one in pipeline.model.named_parameters()}
    model = build("llama")
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    model.train()
    again = colrow.pipeline_parallel(model, worker_mesh(1, 1, 2), example_of("llama"))
    again.step(batch_of("llama"))
    for name, one in again.model.named_parameters():
        if name in expected:
            assert largest_error(one.grad, expected[name]) < 1e-9, name


def test_activation_checkpointing(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_checkpoints)
