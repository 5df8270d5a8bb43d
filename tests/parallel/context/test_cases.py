"""Whatever a program does to tokens is computed as on one device, or refused with the line."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import colrow
from colrow.parallel.context.derive import derive_context
from colrow.trace import Example
from tests.apply.comparison import largest_error
from tests.parallel.context.cases import REFUSED, Case, all_computed
from tests.parallel.context.models import VOCABULARY, mesh_of
from tests.pool import Pool


def _example(length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(VOCABULARY, (2, length), generator=generator)
    return {"ids": ids, "mask": torch.ones_like(ids)}


def _errors() -> list[float]:
    """How far the result, put together, and gradients are from one process's at another length."""
    mesh = mesh_of(cp=2)
    original = Case(all_computed)
    model = colrow.parallelize(copy.deepcopy(original), mesh, _example(10))
    batch = _example(13)
    found, expected = model(**batch), original(**batch)
    errors = [largest_error(found.detach(), expected.detach())]
    weights = torch.arange(13, dtype=torch.float64)[:, None]
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(model.parameters(), original.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        total = one.grad.clone()
        torch.distributed.all_reduce(total)
        errors.append(largest_error(total / 2, other.grad, floor=1e-6))
    return errors


def test_computes_what_treats_tokens_one_by_one(ranks: Callable[[int], Pool]) -> None:
    """Positions, tables and constants are those of the rank's tokens, whatever they are made of."""
    for errors in ranks(2).run(_errors):
        assert max(errors) < 1e-9, errors


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_mixes_tokens(name: str) -> None:
    """The error names the line; nothing is computed."""
    with pytest.raises(colrow.PlanError) as caught:
        derive_context(Case(REFUSED[name]), {"evaluation": Example((), _example(10))})
    assert re.search(
        r"\((tests/parallel/context/(cases|models)\.py:\d+|.* at tests/.*py:\d+)", str(caught.value)
    )
