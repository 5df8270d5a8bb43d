"""Checkpoints of a pipeline have the global form: read by the original library, and at other layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import colrow
from colrow.checkpoint.pretrained import load_weights
from tests.apply.comparison import largest_error
from tests.apply.double import in_double
from tests.parallel.pipeline.models import batch_of, build
from tests.parallel.pipeline.training import (
    STEPS,
    compare,
    compare_parameters,
    make,
    optimizer_of,
    train,
    train_whole,
)
from tests.pool import Pool, worker_mesh


def _save(name: str, shape: dict[str, int], data: str, folder: Path) -> None:
    pipeline = make(name, shape, data, micro_batches=2)
    optimizer = optimizer_of(pipeline)
    train(name, pipeline, range(STEPS), optimizer)
    colrow.save_pretrained(pipeline, folder)
    colrow.save_optimizer(pipeline, optimizer, folder / "optimizer")


def _continue(name: str, shape: dict[str, int], data: str, stages: list[str] | None, folder: Path) -> None:
    whole = build(name)
    reference = optimizer_of(whole)
    train_whole(name, range(STEPS), whole, reference)
    pipeline = make(name, shape, data, micro_batches=2, stages=stages)
    with torch.no_grad():
        for parameter in pipeline.parameters():
            parameter.zero_()
    optimizer = optimizer_of(pipeline)
    load_weights(pipeline, folder)
    colrow.load_optimizer(pipeline, optimizer, folder / "optimizer")
    compare_parameters(pipeline, whole)
    later = range(STEPS, STEPS + 1)
    compare(train(name, pipeline, later, optimizer), train_whole(name, later, whole, reference))
    compare_parameters(pipeline, whole)


def _check_files(name: str, folder: Path) -> None:
    whole = build(name)
    train_whole(name, range(STEPS), whole, optimizer_of(whole))
    saved = type(whole).from_pretrained(folder, dtype=torch.float64)  # type: ignore[attr-defined]
    found = dict(saved.named_parameters())
    assert found.keys() == dict(whole.named_parameters()).keys()
    for key, parameter in whole.named_parameters():
        assert largest_error(found[key].detach(), parameter.detach(), 1e-4) < 1e-9, key


Layout = tuple[dict[str, int], str]


def _round_trip(
    pools: Callable[[int], Pool], name: str, before: Layout, after: Layout, stages: Any, folder: Path
) -> None:
    def size(shape: dict[str, int]) -> int:
        return int(torch.tensor(list(shape.values())).prod())

    pools(size(before[0])).run(_save, name, *before, folder, timeout=300)
    _check_files(name, folder)
    pools(size(after[0])).run(_continue, name, *after, stages, folder, timeout=300)


def test_other_stages(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    names = ["transformer.ln_f"]
    _round_trip(ranks, "gpt2", ({"pp": 2}, ""), ({"pp": 2}, ""), names, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-00002.safetensors"))) == 2


def _load(folder: Path) -> tuple[list[str], float]:
    """A pipeline whose ranks have read their own parts only; its parameters and loss."""
    options = {"schedule": "gpipe", "micro_batches": 2}
    mesh = worker_mesh(1, 1, 2)
    pipeline = colrow.load_pretrained(folder, mesh, pipeline=options, dtype=torch.float64)
    assert isinstance(pipeline, colrow.Pipeline)
    in_double(pipeline.model)
    with torch.no_grad():
        loss = pipeline(**batch_of("gpt2", 1)).loss
    return [name for name, _ in pipeline.model.named_parameters()], loss.item()


def test_load_into_stages(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    whole = build("gpt2")
    whole.save_pretrained(tmp_path)  # type: ignore[operator]
    (first, loss), (last, same) = ranks(2).run(_load, tmp_path)
    assert loss == same
    with torch.no_grad():
        expected = whole(**batch_of("gpt2", 1)).loss.item()
    assert math.isclose(loss, expected, rel_tol=1e-9)
    assert set(first) & set(last) == {"transformer.wte.weight"}
    assert set(first) | set(last) == {name for name, _ in whole.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (({"pp": 2, "tp": 2}, ""), ({"pp": 2, "dp": 2}, "fsdp")),
        (({"pp": 2, "dp": 2}, "fsdp"), ({"pp": 2, "tp": 2}, "")),
        (({"pp": 2, "dp": 2}, "ddp"), ({"pp": 2}, "")),
    ],
)
def test_other_layouts(ranks: Callable[[int], Pool], before: Layout, after: Layout, tmp_path: Path) -> None:
    _round_trip(ranks, "llama tied", before, after, None, tmp_path)
