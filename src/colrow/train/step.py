"""One optimizer step, and one validation: plain PyTorch on a cut model."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import colrow
from colrow.train.configuration import Precision

IGNORED = -100
"""The label of positions that are not to be predicted, as in transformers."""


def autocast(precision: Precision, device_type: str) -> AbstractContextManager[Any]:
    """The context of the forward pass: computing in bfloat16 for ``bf16-mixed``."""
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16-mixed")


def predicted_tokens(labels: Tensor) -> int:
    """How many tokens of [sequences, length] are predicted: all but the first of each and ignored ones."""
    return int((labels[:, 1:] != IGNORED).sum())


def accumulate_gradients(model: Any, batch: Tensor, micro_batch_size: int, precision: Precision) -> Tensor:
    """Forward and backward over a batch, some sequences at a time.

    The gradients that are added to the parameters, and the loss, are those of the mean over all predicted
    tokens of the batch, however it is divided.

    Args:
        model: a transformers causal language model, cut or whole.
        batch: token ids [sequences, length], on the model's device.
        micro_batch_size: sequences at a time.
        precision: whether to compute in bfloat16.

    Returns:
        The loss before the step: float64, a scalar on the model's device.
    """
    total = predicted_tokens(batch)
    loss = torch.zeros((), dtype=torch.float64, device=batch.device)
    for micro_batch in batch.split(micro_batch_size):
        with autocast(precision, batch.device.type):
            mean = model(input_ids=micro_batch, labels=micro_batch).loss
        share = predicted_tokens(micro_batch) / total
        (mean * share if share != 1 else mean).backward()
        loss += mean.detach().double() * share
    return loss


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
def mean_loss(model: Any, batches: Any, precision: Precision, device: torch.device) -> float:
    """The mean loss per predicted token over batches of token ids; leaves the model as it was.

    Draws no random numbers: the model is in evaluation mode meanwhile.
    """
    was_training = model.training
    model.eval()
    total, loss = 0, 0.0
    try:
        for batch in batches:
            batch = batch.to(device)
            count = predicted_tokens(batch)
            with autocast(precision, device.type):
                mean = model(input_ids=batch, labels=batch).loss
            loss += float(mean) * count
            total += count
    finally:
        model.train(was_training)
    return loss / total
