"""colrow: the plain model, cut by the plan that is derived from a call of it."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

import colrow

from ..shapes import Case
from .counting import Moved
from .models import plain_model
from .trainer import Trainer, batch


class ColrowTrainer(Trainer):
    """Counts with colrow's own counters, which see every transport."""

    def count(self, tokens: Tensor) -> Moved:
        colrow.reset_comm_stats()
        self.step(tokens)
        total = colrow.comm_stats().total
        return Moved(total.count, total.bytes)


def parallelized(case: Case, folder: Path, *, sequence: bool = False) -> nn.Module:
    """The model, cut over the ranks; with ``sequence`` along the sequence too, between regions."""
    mesh = colrow.init_mesh(tp=case.ranks, device="cpu")
    model = plain_model(case, folder).train()
    tokens = batch(case, 0)
    return colrow.parallelize(model, mesh, {"input_ids": tokens, "labels": tokens}, sequence=sequence)


def settings() -> list[str]:
    """What the environment tells colrow to do in another way than it would by itself."""
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("COLROW_")]


def build(case: Case, folder: Path) -> ColrowTrainer:
    trainer = ColrowTrainer(parallelized(case, folder))
    trainer.notes = settings()
    return trainer
