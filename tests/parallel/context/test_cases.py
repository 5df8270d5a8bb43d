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
from tests.parallel.context.cases import GATHERED, REFUSED, Case, Ends, all_computed
from tests.parallel.context.models import VOCABULARY, error_of_gradients, mesh_of
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
    return [*errors, error_of_gradients(model, original)]


def test_computes_what_treats_tokens_one_by_one(ranks: Callable[[int], Pool]) -> None:
    """Positions, tables and constants are those of the rank's tokens, whatever they are made of."""
    for errors in ranks(2).run(_errors):
        assert max(errors) < 1e-9, errors


def _ends(name: str) -> list[float]:
    original = Ends(GATHERED[name])
    ids, batch = _example(10)["ids"], _example(13)["ids"]
    model = colrow.parallelize(copy.deepcopy(original), mesh_of(cp=2), {"ids": ids})
    found, expected = model(batch), original(batch)
    weights = torch.arange(1.0, found.numel() + 1, dtype=torch.float64).view(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one in (model.head, original.head):  # of ends without a head
        for parameter in one.parameters():  # type: ignore[union-attr]
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return [largest_error(found.detach(), expected.detach()), error_of_gradients(model, original)]


@pytest.mark.parametrize("name", GATHERED)
def test_gathers_for_what_is_not_one_for_each_token(ranks: Callable[[int], Pool], name: str) -> None:
    for errors in ranks(2).run(_ends, name):
        assert max(errors) < 1e-9


def test_refuses_chance_in_what_all_ranks_compute() -> None:
    """Each would draw other numbers."""
    model = Ends(lambda model, x: torch.dropout(x.mean(1), 0.5, True))
    with pytest.raises(colrow.PlanError, match="mean needs the whole sequence") as caught:
        derive_context(model, {"training": Example((), {"ids": _example(10)["ids"]})})
    assert "draws random numbers for what every rank computes" in str(caught.value.__cause__)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_mixes_tokens(name: str) -> None:
    """The error names the line; nothing is computed."""
    with pytest.raises(colrow.PlanError) as caught:
        derive_context(Case(REFUSED[name]), {"evaluation": Example((), _example(10))})
    assert re.search(
        r"\((tests/parallel/context/(cases|models)\.py:\d+|.* at tests/.*py:\d+)", str(caught.value)
    )
