"""Schedules that divide backward passes compute, and reduce, each gradient once, as the others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import colrow
from colrow.layers import linear_functions, siblings
from tests.parallel.pipeline.models import batch_of
from tests.parallel.pipeline.training import make
from tests.pool import Pool

PRODUCTS = [
    (linear_functions, "gradient_of_input"),
    (linear_functions, "gradient_of_weight"),
    (siblings, "gradient_of_input"),
    (siblings, "add_gradient_of_input"),
    (siblings, "gradient_of_weight"),
]


def _work(schedule: str) -> dict[str, int]:
    """Products of gradients in a step, and what is communicated backward."""
    pipeline = make("llama", {"pp": 2, "tp": 2}, schedule=schedule, micro_batches=4)
    batch = batch_of("llama", 0)
    pipeline.step(batch)
    counts: dict[str, int] = {}
    originals = [getattr(module, name) for module, name in PRODUCTS]

    def counted(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            counts[key] = counts.get(key, 0) + 1
            return function(*arguments)

        return count

    for (module, name), function in zip(PRODUCTS, originals, strict=True):
        setattr(module, name, counted(f"{module.__name__}.{name}", function))
    try:
        colrow.reset_comm_stats()
        pipeline.step(batch)
    finally:
        for (module, name), function in zip(PRODUCTS, originals, strict=True):
            setattr(module, name, function)
    reduced = colrow.comm_stats().where(operation="all_reduce", phase="backward")
    return {**counts, "all-reduces": reduced.count, "bytes": reduced.bytes}


def test_nothing_is_done_twice(ranks: Callable[[int], Pool]) -> None:
    pool = ranks(4)
    whole = pool.run(_work, "interleaved_1f1b")
    assert all(len(one) == len(PRODUCTS) + 2 for one in whole)
    assert pool.run(_work, "interleaved_zero_bubble") == whole
