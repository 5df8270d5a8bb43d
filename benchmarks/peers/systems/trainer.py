"""What the worker program asks of a system."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..shapes import DTYPES, Case
from .counting import Moved, counted

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01


class Trainer:
    """A model, its optimizer and what a step is; systems override what differs.

    The default is a model that takes labels and returns an object with a ``loss``, and torch's AdamW.

    Attributes:
        notes: what the table's reader must know about this system, such as what carries its collectives.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        self.notes: list[str] = []

    def loss(self, tokens: Tensor) -> Tensor:
        """The mean loss, to be differentiated; ``tokens`` are ``[batch, sequence]`` ids, also the labels."""
        loss = self.model(input_ids=tokens, labels=tokens).loss
        assert isinstance(loss, Tensor)
        return loss

    def step(self, tokens: Tensor) -> Tensor:
        """Forward, backward, AdamW: what is timed. The loss is read later."""
        loss = self.loss(tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def wait_for_others(self) -> None:
        """Return once all ranks are here: torch's own barrier, before a step and not timed."""
        if dist.is_initialized():
            dist.barrier()

    def count(self, tokens: Tensor) -> Moved:
        """Do a step and say what this rank communicated in it."""
        with counted() as moved:
            self.step(tokens)
        return moved


def start_gloo() -> None:
    """Join the ranks' process group, which the environment describes."""
    dist.init_process_group("gloo")


def dtype_of(case: Case) -> torch.dtype:
    dtype = getattr(torch, DTYPES[case.dtype])
    assert isinstance(dtype, torch.dtype)
    return dtype


def batch(case: Case, number: int) -> Tensor:
    """The tokens ``[batch, sequence]`` of one step, the same in every process.

    Small ids are more frequent, which a model learns within a few steps: losses fall, and a wrong gradient
    shows in them.
    """
    generator = torch.Generator().manual_seed(1000 + number)
    uniform = torch.rand(case.shape.batch, case.shape.sequence, generator=generator, dtype=torch.float64)
    return (uniform**3 * case.shape.vocabulary).long()


def folder_of_model(folder: Path, case: Case) -> Path:
    """Where :mod:`prepare` has written the model that transformers can read."""
    return folder / case.shape.name
