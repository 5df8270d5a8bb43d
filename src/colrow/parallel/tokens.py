"""The mean over all tokens of all replicas, however unequal their numbers."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from colrow.collectives import communicator
from colrow.mesh import replicas


def token_weight(mesh: DeviceMesh, tokens: int) -> float:
    """What one token counts in a step, on replicas whose gradients are averaged.

    The mean over the tokens of each replica, averaged over replicas, weighs a token more where there are
    fewer of them. With ``weight = token_weight(mesh, tokens)`` the gradient is that of the mean over all
    tokens of all replicas, however they are divided into micro-batches:

    - a micro-batch's mean loss over ``n`` tokens is multiplied by ``n * weight``,
    - a sum of losses by ``weight``.

    A micro-batch without any token has no mean: that is not a number, and stays none when multiplied by 0.
    Take the sum of its losses. It cannot be left out: other replicas wait for this one, under FSDP and with
    experts in every micro-batch, under DDP in the last.

    Args:
        mesh: with a dimension ``dp``. Every rank of the job calls this: one all-reduce of one number.
        tokens: labels that this replica's batch predicts in this step, in all its micro-batches; ignored
            ones do not count. The same on all ranks of a replica.

    Returns:
        Number of replicas / number of tokens of all of them.

    Raises:
        ValueError: if there are none; on all ranks.
    """
    everyone = communicator(replicas(mesh))
    total = torch.tensor([tokens], dtype=torch.int64, device=mesh.device_type)
    count = int(everyone.all_reduce(total, label="tokens of all replicas").item())
    if count <= 0:
        raise ValueError("no replica has a token to predict in this step: all labels are ignored")
    return everyone.size / count
