"""Steps unlike the one before: a replica without labels, other parameters trained, another precision."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.data_shards import joined
from colrow.mesh import coordinate
from colrow.parallel import Pipeline
from colrow.parallel.data import Kind
from tests.apply.comparison import largest_error
from tests.parallel.pipeline.models import IGNORED, VOCABULARY, WithSkips
from tests.pool import Pool, worker_mesh

BOTTOM = ("embedding", "scale", "down.0")


class WithLoss(nn.Module):
    """Layers that give what autocast says: what passes between stages has its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.float().square().mean()}


def _model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return WithSkips().to(dtype)


def _batch(seed: int, rows: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "labels": ids}


def _same_gradients(pipeline: Pipeline, whole: nn.Module, tolerance: float = 1e-9) -> None:
    expected = dict(whole.named_parameters())
    for name, parameter in pipeline.model.named_parameters():
        other = expected[name].grad
        assert (parameter.grad is None) == (other is None), name
        if parameter.grad is not None and other is not None:
            assert largest_error(joined(parameter.grad), other) < tolerance, name


def _without_labels(kind: Kind) -> None:
    mesh = worker_mesh(tp=1, pp=2, dp=2)
    pipeline = colrow.pipeline_parallel(_model(), mesh, _batch(0), schedule="1f1b", micro_batches=2)
    colrow.data_parallel(pipeline, mesh, kind)
    whole, batches = _model(), [_batch(1), _batch(2)]
    batches[1]["labels"] = torch.full_like(batches[1]["labels"], IGNORED)
    own = batches[coordinate(mesh, "dp")]
    tokens = int((own["labels"] != IGNORED).sum())
    pipeline.step(own, colrow.token_weight(mesh, tokens) * tokens)
    whole(**batches[0])["loss"].backward()
    _same_gradients(pipeline, whole)
    if not tokens:
        with pytest.raises(ValueError, match="no label of this batch counts"):
            pipeline.step(own)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_replica_without_labels(ranks: Callable[[int], Pool], kind: Kind) -> None:
    """FSDP reduces the gradients that there are: the other replica waited for this one's."""
    ranks(4).run(_without_labels, kind)


def _train_all_but(model: nn.Module, frozen: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
        parameter.grad = None


def _frozen(schedule: str) -> None:
    mesh = worker_mesh(tp=1, pp=2)
    pipeline = colrow.pipeline_parallel(_model(), mesh, _batch(0), schedule=schedule, micro_batches=2)
    whole = _model()
    for step, frozen in enumerate([("up.0",), BOTTOM, ("head",)]):
        _train_all_but(whole, frozen)
        _train_all_but(pipeline.model, frozen)
        whole(**_batch(step))["loss"].backward()
        pipeline.step(_batch(step))
        _same_gradients(pipeline, whole)


@pytest.mark.parametrize("schedule", ["gpipe", "zbv"])
def test_frozen_and_trained_again(ranks: Callable[[int], Pool], schedule: str) -> None:
    """Whether gradients are sent depends on what is trained before a stage."""
    ranks(2).run(_frozen, schedule)


def _cast() -> None:
    mesh = worker_mesh(tp=1, pp=2)
    torch.manual_seed(0)
    model = WithLoss()
    batch = {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(1))}
    whole = copy.deepcopy(model)
    pipeline = colrow.pipeline_parallel(model, mesh, batch, schedule="1f1b", micro_batches=2)
    for dtype in (None, torch.bfloat16, None):
        for one in (whole, pipeline.model):
            for parameter in one.parameters():
                parameter.grad = None
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            whole(**batch)["loss"].backward()
            pipeline.step(batch)
        _same_gradients(pipeline, whole, 1e-5 if dtype is None else 0.05)


def test_autocast_changes_what_is_sent(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_cast)
