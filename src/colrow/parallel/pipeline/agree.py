"""What the ranks of a pipeline tell each other before a step: that they are about to do the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from colrow.collectives import Communicator
from colrow.replicas import digest, fingerprint


def agree(
    ranks: Communicator,
    device: torch.device,
    batch: Mapping[str, Any],
    call: Sequence[object],
    trained: Sequence[str],
) -> tuple[int, ...]:
    """Compare the ranks' batches; one small all-gather.

    Args:
        ranks: along ``pp``, all of which call this.
        device: that their collectives work on.
        batch: with tensors, which must be the same on all ranks to the bit.
        call: what else must be the same.
        trained: names of this rank's parameters that are trained, which are others on each rank.

    Returns:
        Of each rank a number that differs when it trains other parameters.

    Raises:
        ValueError: if something is not the same; on all ranks. Each rank would train what it has of the
            model on a batch of its own.
    """
    sums = torch.zeros(2, dtype=torch.int64, device=device)
    for place, (_, item) in enumerate(sorted(batch.items())):
        if isinstance(item, Tensor):
            sums += fingerprint(item).to(device) * (2 * place + 1)
    told = torch.tensor([digest(repr(trained)), digest(repr(call))], dtype=torch.int64, device=device)
    everyone = ranks.all_gather(torch.cat([told, sums])[None], 0, label="compare the stages' batches")
    if (everyone[:, 1:] != everyone[:1, 1:]).any():
        raise ValueError(
            "the ranks of a pipeline are given different batches or weights, or are not all training: each "
            "computes its stages for the same batch, so give all of them the same; other ranks of dp get "
            "other batches"
        )
    return tuple(everyone[:, 0].tolist())
