"""One optimizer step, and one validation: plain PyTorch on a cut model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.collectives import communicator
from colrow.mesh import replicas
from colrow.train.configuration import Precision

IGNORED = -100
"""The label of positions that are not to be predicted, as in transformers."""


def autocast(precision: Precision, device_type: str) -> AbstractContextManager[Any]:
    """The context of the forward pass: computing in bfloat16 for ``bf16-mixed``."""
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16-mixed")


def predicted_tokens(labels: Tensor) -> int:
    """How many tokens of [sequences, length] are predicted: all but the first of each and ignored ones."""
    return int((labels[:, 1:] != IGNORED).sum())


def accumulate_gradients(
    model: Any, batch: Tensor, micro_batch_size: int, precision: Precision, mesh: DeviceMesh
) -> Tensor:
    """Forward and backward over a batch, some sequences at a time.

    The gradients that are added to the parameters, and the loss, are those of the mean over all predicted
    tokens of all replicas' batches, however they are divided.

    Args:
        model: a transformers causal language model, cut or whole, with or without replicas; or a pipeline.
        batch: this replica's token ids [sequences, length], on the model's device.
        micro_batch_size: sequences at a time; as many times on every replica. A pipeline has its own number
            of micro-batches.
        precision: whether to compute in bfloat16.
        mesh: the ranks.

    Returns:
        The loss before the step: float64, a scalar on the model's device, the same on every rank.
    """
    tokens = predicted_tokens(batch)
    weight = colrow.token_weight(mesh, tokens)
    if isinstance(model, colrow.Pipeline):
        with autocast(precision, batch.device.type):
            loss = model.step({"input_ids": batch, "labels": batch}, weight * tokens) * (weight * tokens)
        return _sum_over_replicas(loss, mesh) / replicas(mesh).size()
    loss = torch.zeros((), dtype=torch.float64, device=batch.device)
    micro_batches = batch.split(micro_batch_size)
    for number, micro_batch in enumerate(micro_batches, 1):
        is_last = number == len(micro_batches)
        with nullcontext() if is_last else colrow.no_gradient_sync(model):
            with autocast(precision, batch.device.type):
                mean = model(input_ids=micro_batch, labels=micro_batch).loss
            share = predicted_tokens(micro_batch) * weight
            (mean * share if share != 1 else mean).backward()
        loss += mean.detach().double() * share
    return _sum_over_replicas(loss, mesh) / replicas(mesh).size()


def _whole_micro_batches(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and labels of a batch; of a pipeline's with rows that are not predicted, if it has too few."""
    missing = -len(batch) % model.micro_batches if isinstance(model, colrow.Pipeline) else 0
    filling = batch[:1].expand(missing, -1)
    return torch.cat([batch, filling]), torch.cat([batch, torch.full_like(filling, IGNORED)])


def _sum_over_replicas(numbers: Tensor, mesh: DeviceMesh) -> Tensor:
    return communicator(replicas(mesh)).all_reduce(numbers, label="numbers of all replicas")


def optimizer_step(
    model: Any, optimizer: torch.optim.Optimizer, learning_rate: float, max_norm: float | None
) -> Tensor:
    """Clip, step with this learning rate, and forget the gradients.

    Returns:
        The norm of the gradient of all parameters together, before clipping.
    """
    norm = colrow.clip_grad_norm_(model, math.inf if max_norm is None else max_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def mean_loss(
    model: Any,
    batches: Iterable[tuple[Tensor, bool]],
    precision: Precision,
    device: torch.device,
    mesh: DeviceMesh,
) -> float:
    """The mean loss per predicted token over all replicas' batches; leaves the model as it was.

    Draws no random numbers: the model is in evaluation mode meanwhile.

    Args:
        model: see :func:`accumulate_gradients`.
        batches: this replica's token ids, and whether they count: as many as on other replicas.
        precision: whether to compute in bfloat16.
        device: of the model.
        mesh: the ranks.
    """
    was_training = model.training
    model.eval()
    found = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of tokens
    try:
        for batch, counts in batches:
            batch = batch.to(device)
            count = predicted_tokens(batch)
            rows, labels = _whole_micro_batches(model, batch)
            with autocast(precision, device.type):
                mean = model(input_ids=rows, labels=labels).loss
            if counts:
                found += torch.stack([mean.double() * count, torch.full_like(mean, count).double()])
    finally:
        model.train(was_training)
    loss, total = _sum_over_replicas(found, mesh).tolist()
    return float(loss / total)
