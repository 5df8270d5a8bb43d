"""Collectives through gloo, as between hosts, where they are not gloo's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.collectives import Communicator, communicator
from tests.pool import Pool

SIZES = {2: ((3, 2), (5, 0)), 3: ((2, 2, 1), (0, 5, 0)), 4: ((1, 1, 1, 2), (0, 3, 0, 2))}
"""Extents of a dimension of five on each rank."""


def through_gloo() -> Communicator:
    """All ranks, who do not use the memory that they share: a group decides when it is first used."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("COLROW_TRANSPORT", "gloo")
        ranks = communicator(dist.new_group(backend="gloo"))
        ranks.barrier()
    assert ranks._shared is None
    return ranks


def parts_of(ranks: Communicator, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """What each rank contributes, which every rank can work out."""
    generator = torch.Generator().manual_seed(ranks.size)
    return [(torch.randn(shape, generator=generator) * 100).to(dtype) for _ in range(ranks.size)]


def in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _reduce_scatter() -> None:
    ranks = through_gloo()
    for dtype in (torch.float64, torch.float32, torch.int64):
        for dimension, shape in enumerate([(5, 4), (4, 5), (2, 3, 5)]):
            parts = parts_of(ranks, shape, dtype)
            mine = parts[ranks.rank].clone()
            for operand in (mine, mine.mT.contiguous().mT):
                for sizes in SIZES[ranks.size]:
                    part = ranks.reduce_scatter(operand, dimension, sizes)
                    expected = in_order(parts).split(sizes, dimension)[ranks.rank]
                    assert part.is_contiguous()
                    assert torch.equal(part, expected)
                    assert torch.equal(operand, parts[ranks.rank])
    assert ranks.reduce_scatter(torch.ones(2, 0), 0, [2, *[0] * (ranks.size - 1)]).numel() == 0
    assert ranks.reduce_scatter(torch.ones(2 * ranks.size), 0).tolist() == [ranks.size] * 2


def _rounded_once() -> None:
    ranks = through_gloo()
    for dtype in (torch.bfloat16, torch.float16):
        parts = parts_of(ranks, (9, ranks.size), dtype)
        exact = in_order([part.float() for part in parts]).to(dtype)
        assert torch.equal(ranks.reduce_scatter(parts[ranks.rank], 1), exact[:, ranks.rank : ranks.rank + 1])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_of_parts(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_reduce_scatter)


@pytest.mark.parametrize("size", [2, 3])
def test_half_precision_is_rounded_once(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_rounded_once)
