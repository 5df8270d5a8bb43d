"""Training in a pipeline beside training in one process: what every test of a pipeline's numbers does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import colrow
from colrow.data_shards import joined
from colrow.mesh import coordinate, size_of
from colrow.parallel import Pipeline
from tests.apply.comparison import assemble, largest_error
from tests.parallel.pipeline.models import IGNORED, batch_of, build, example_of, parts_of
from tests.pool import worker_mesh

STEPS = 2
CLIP = 0.05


def make(
    name: str, shape: dict[str, int], data: str = "", sequence: bool = False, **options: Any
) -> Pipeline:
    """A pipeline of the model of a name on a mesh of a shape."""
    mesh = worker_mesh(shape.get("tp", 1), shape.get("dp", 1), shape["pp"])
    model = build(name)
    if shape.get("tp", 1) > 1:
        colrow.parallelize(model, mesh, example_of(name), sequence=sequence)
    pipeline = colrow.pipeline_parallel(model, mesh, example_of(name), **options)
    if data:
        assert colrow.data_parallel(pipeline, mesh, data) is pipeline  # type: ignore[arg-type]
    return pipeline


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # not Adam, which would make much of gradients that are zero but for rounding
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def train_whole(name: str, steps: range, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """By one process: loss, norm and gradients of each step."""
    found = []
    for step in steps:
        optimizer.zero_grad()
        output = model(**batch_of(name, step))
        loss = output["loss"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        gradients = {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}
        optimizer.step()
        found.append((loss.item(), norm.item(), gradients))
    return found


def tokens_of(name: str, batch: dict[str, Any]) -> int:
    shifted = name not in ("skips", "t5", "bert")
    labels = batch["labels"][:, 1:] if shifted else batch["labels"]
    return int((labels != IGNORED).sum())


def train(
    name: str, pipeline: Pipeline, steps: range, optimizer: torch.optim.Optimizer, halves: bool = False
) -> list[Any]:
    """In a pipeline: the same of this rank's parameters, in global form."""
    mesh = colrow.state_of(pipeline).mesh
    replicas = size_of(mesh, "dp")
    found = []
    for step in steps:
        optimizer.zero_grad()
        own = parts_of(pipeline, batch_of(name, step), replicas)[coordinate(mesh, "dp")]
        tokens = tokens_of(name, own)
        weight = colrow.token_weight(mesh, tokens) * tokens
        loss = pipeline.step(own, weight) * weight / replicas
        if replicas > 1:
            total = colrow.collectives.communicator(mesh["dp"])
            loss = total.all_reduce(loss.reshape(1), label="loss").reshape(())
        norm = colrow.clip_grad_norm_(pipeline, CLIP)
        gradients = {
            key: joined(one.grad) for key, one in pipeline.model.named_parameters() if one.grad is not None
        }
        gradients = assemble(pipeline, gradients)
        optimizer.step()
        found.append((loss.item(), norm.item(), gradients))
    return found


def compare(found: list[Any], expected: list[Any]) -> None:
    for (loss, norm, gradients), (whole_loss, whole_norm, whole) in zip(found, expected, strict=True):
        assert math.isclose(loss, whole_loss, rel_tol=1e-9), (loss, whole_loss)
        assert math.isclose(norm, whole_norm, rel_tol=1e-9), (norm, whole_norm)
        largest = max(float(one.abs().max()) for one in whole.values())
        for key, gradient in gradients.items():
            # softmax does not change with a constant, so that some gradients are zero but for rounding
            assert largest_error(gradient, whole[key], 1e-4 * largest) < 1e-9, key


def compare_parameters(pipeline: Pipeline, whole: nn.Module) -> list[str]:
    """This rank's parameters must be those of the whole model; gives their names."""
    own = {key: joined(one.detach()) for key, one in pipeline.model.named_parameters()}
    reference: dict[str, Tensor] = dict(whole.named_parameters())
    for key, parameter in assemble(pipeline, own).items():
        assert largest_error(parameter, reference[key].detach(), 1e-4) < 1e-9, key
    return list(own)


def trains_as_one(name: str, shape: dict[str, int], options: dict[str, Any], data: str = "") -> list[str]:
    """Two steps in a pipeline must give what one process gets; the names of this rank's parameters."""
    pipeline = make(name, shape, data, **options)
    whole = build(name)
    count = colrow.count_parameters(pipeline)
    assert count.total == sum(one.numel() for one in whole.parameters())
    assert count.local < count.total
    expected = train_whole(name, range(STEPS), whole, optimizer_of(whole))
    found = train(name, pipeline, range(STEPS), optimizer_of(pipeline))
    compare(found, expected)
    colrow.check_replicas(pipeline)
    names = compare_parameters(pipeline, whole)
    assert set(found[0][2]) == set(names) & set(expected[0][2])
    if data == "fsdp" and "dp" in shape:
        assert count.local < 0.7 * colrow.count_parameters(make(name, shape, "ddp", **options)).local
    if "dp" not in shape:
        _evaluates_as_one(name, pipeline, whole)
    return names


def _evaluates_as_one(name: str, pipeline: Pipeline, whole: nn.Module) -> None:
    batch = batch_of(name, STEPS)
    with torch.no_grad():
        found, expected = pipeline(**batch), whole(**batch)
        assert math.isclose(found.loss.item(), expected["loss"].item(), rel_tol=1e-9)
        is_last = pipeline.layout.rank_of[-1] == colrow.state_of(pipeline).pipeline.communicator.rank
        assert (found.output is not None) == is_last
        if is_last and colrow.state_of(pipeline).communicator.size == 1:
            assert largest_error(found.output["logits"], expected["logits"]) < 1e-9
