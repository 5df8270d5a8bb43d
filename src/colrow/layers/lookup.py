"""A call of ``F.embedding`` on a table of which each rank holds some rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from colrow.collectives import Communicator
from colrow.layers.embedding import _Lookup, check_range
from colrow.layout import Cut


def lookup(ranks: Communicator, cut: Cut, label: str) -> Callable[..., Tensor]:
    """What to call in place of ``F.embedding`` where the table's rows are cut.

    Args:
        ranks: the tensor-parallel group.
        cut: rows per rank, consecutive ones.
        label: names the collective in errors and statistics.
    """
    start, stop = cut.start(ranks.rank), cut.stop(ranks.rank)

    def embedding(
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise ValueError(f"{label}: max_norm, scale_grad_by_freq and sparse need the whole table")
        check_range(input, cut.units, f"the ids given to {label}")
        missing = (input < start) | (input >= stop)
        local_ids = torch.where(missing, 0, input - start)
        without_gradient = missing
        if padding_idx is not None and padding_idx >= 0:
            without_gradient = missing | (input == padding_idx)
        rows: Tensor = _Lookup.apply(weight, local_ids, missing, without_gradient, ranks, f"lookup {label}")
        return rows

    return embedding
