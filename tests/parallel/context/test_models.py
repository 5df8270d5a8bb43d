"""Models whose sequences are cut over ranks compute what one process computes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
from torch import nn

from colrow.verify.precision import one_precision
from tests.parallel.context import models
from tests.parallel.context.models import differences
from tests.parallel.experts import models as experts
from tests.pool import Pool


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (models.llama_ring, {"cp": 2}),
        (models.llama_ulysses, {"cp": 2}),
        (models.gpt2, {"cp": 2}),
        (models.nano_moves, {"cp": 2}),
        pytest.param(models.nano, {"cp": 2}, marks=pytest.mark.slow),
        pytest.param(models.nano_flat, {"cp": 2}, marks=pytest.mark.slow),
        pytest.param(models.nano_moves, {"cp": 3}, marks=pytest.mark.slow),
        pytest.param(models.llama_ring, {"cp": 3}, marks=pytest.mark.slow),
        pytest.param(models.llama_three, {"cp": 3}, marks=pytest.mark.slow),
        (models.llama_ring, {"cp": 2, "tp": 2}),
        pytest.param(models.llama_ulysses, {"cp": 2, "dp": 2}, marks=pytest.mark.slow),
    ],
)
def test_trains_as_one_process(
    ranks: Callable[[int], Pool], build: Callable[[], nn.Module], sizes: dict[str, int]
) -> None:
    """Loss, every gradient, parameters after two steps and logits, with uneven lengths that change."""
    for found in ranks(prod(sizes.values())).run(differences, build, [13, 10], sizes):
        assert max(found.values()) < 1e-9, {name: one for name, one in found.items() if one > 1e-9}


@pytest.mark.slow
@pytest.mark.parametrize("build", [models.llama_ring, models.llama_ulysses])
def test_with_sequences_cut_between_regions(
    ranks: Callable[[int], Pool], build: Callable[[], nn.Module]
) -> None:
    """A rank's tokens are cut once more, over tp, where regions end."""
    for found in ranks(4).run(_with_sequence, build):
        assert max(found.values()) < 1e-9


def _with_sequence(build: Callable[[], nn.Module]) -> dict[str, float]:
    return differences(build, [13, 10], {"cp": 2, "tp": 2}, sequence=True)


@pytest.mark.slow
def test_trains_with_fsdp(ranks: Callable[[int], Pool]) -> None:
    """The second loss is that of parameters that were updated by averaged gradients."""
    for found in ranks(2).run(differences, models.llama_ring, [13, 10], {"cp": 2}, "fsdp"):
        assert max(found.values()) < 1e-9


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (models.mixtral, {"cp": 2}),
        (models.mixtral, {"cp": 2, "ep": 2}),
        pytest.param(models.mixtral, {"cp": 3}, marks=pytest.mark.slow),
        pytest.param(models.mixtral, {"cp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param(models.mixtral, {"cp": 2, "dp": 2}, marks=pytest.mark.slow),
        pytest.param(experts.deepseek, {"cp": 2}, marks=pytest.mark.slow),
        pytest.param(experts.deepseek, {"cp": 2, "ep": 2}, marks=pytest.mark.slow),
    ],
)
def test_experts_and_the_loss_of_their_routers(
    ranks: Callable[[int], Pool], build: Callable[[], nn.Module], sizes: dict[str, int]
) -> None:
    """Each token chooses its experts on the rank that has it; how evenly is a loss of all ranks' tokens."""
    for found in ranks(prod(sizes.values())).run(_in_one_precision, build, sizes):
        assert max(found.values()) < 1e-9, {name: one for name, one in found.items() if one > 1e-9}


def _in_one_precision(build: Callable[[], nn.Module], sizes: dict[str, int]) -> dict[str, float]:
    with one_precision():  # routers compute in single precision
        return differences(build, [13, 10], sizes)
