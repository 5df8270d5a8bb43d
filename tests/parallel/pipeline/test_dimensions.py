"""Stages whose experts, or whose sequences, are divided too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.errors import PlanError
from colrow.mesh import coordinate
from colrow.verify.precision import one_precision
from tests.parallel.experts.models import VOCABULARY, mixtral
from tests.pool import Pool, worker_mesh


def _batch(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def _losses(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    return [model(**batch).loss.item() for batch in batches]


def _with_other_lengths() -> None:
    """Lengths are new to one rank of ``ep`` in one step, to the other in another."""
    mesh = worker_mesh(tp=1, pp=2, ep=2)
    example = _batch(2, 5, 0)
    lengths = [(5, 5), (5, 7), (7, 7), (9, 5)]
    mine = coordinate(mesh, "ep")
    batches = [_batch(2, both[mine], step + 10 * mine) for step, both in enumerate(lengths)]
    with one_precision():
        original = mixtral()
        expected = _losses(original, batches)
        model = colrow.parallelize(mixtral(), mesh, example)
        pipeline = colrow.pipeline_parallel(model, mesh, example, schedule="gpipe", micro_batches=2)
        colrow.data_parallel(pipeline, mesh, "ddp")
        found = [pipeline.step(batch).item() for batch in batches]
        assert found == pytest.approx(expected, rel=1e-12)
        with torch.no_grad():
            assert pipeline(**batches[-1]).loss.item() == pytest.approx(expected[-1], rel=1e-12)


def test_ranks_of_experts_may_have_other_lengths(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_with_other_lengths)


def _whole_model(dimension: str) -> str:
    mesh = worker_mesh(tp=1, pp=2, **{dimension: 2})
    with pytest.raises(PlanError) as raised:
        colrow.pipeline_parallel(mixtral(), mesh, _batch(2, 5, 0))
    return str(raised.value)


@pytest.mark.parametrize("dimension", ["ep", "cp"])
def test_a_whole_model_is_refused(ranks: Callable[[int], Pool], dimension: str) -> None:
    message = ranks(4).run(_whole_model, dimension)[0]
    assert f"the mesh has 2 ranks along {dimension}, and the model is whole" in message
