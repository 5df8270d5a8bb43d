"""colrow's plan with communication removed: wrong numbers, and the time that no transport can beat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import colrow
from colrow.collectives import Communicator, Pending

from ..shapes import Case
from .colrow import ColrowTrainer, parallelized, settings
from .counting import Moved, counted


class SilentCommunicator(Communicator):
    """Gives back this rank's own values in the right shape, and sends nothing."""

    def start_all_reduce(
        self, tensor: Tensor, reduction: str = "sum", *, label: str = "", owned: bool = False
    ) -> Pending:
        return Pending.completed(tensor)

    def start_all_gather(
        self, shard: Tensor, dimension: int, sizes: Sequence[int] | None = None, *, label: str = ""
    ) -> Pending:
        shape = list(shard.shape)
        shape[dimension] = shard.shape[dimension] * self.size if sizes is None else sum(sizes)
        return Pending.completed(shard.new_zeros(shape))

    def start_reduce_scatter(
        self, tensor: Tensor, dimension: int, sizes: Sequence[int] | None = None, *, label: str = ""
    ) -> Pending:
        extent = tensor.shape[dimension] // self.size if sizes is None else sizes[self.rank]
        return Pending.completed(tensor.narrow(dimension, 0, extent))

    def start_broadcast(
        self, tensor: Tensor, source: int, *, label: str = "", owned: bool = False
    ) -> Pending:
        return Pending.completed(tensor)

    def start_reduce(
        self, tensor: Tensor, destination: int, *, label: str = "", owned: bool = False
    ) -> Pending:
        return Pending.completed(tensor)


class LimitTrainer(ColrowTrainer):
    """Refuses to be measured if anything is sent after all."""

    def count(self, tokens: Tensor) -> Moved:
        with counted() as by_torch:
            by_colrow = super().count(tokens)
        if by_torch.collectives or by_colrow.collectives:
            raise RuntimeError(
                f"the limit still communicates: {by_colrow.collectives} collectives by colrow's count, "
                f"{by_torch.collectives} by torch's"
            )
        return by_colrow


def build(case: Case, folder: Path) -> LimitTrainer:
    model = parallelized(case, folder)
    # cutting the model needed the other ranks; from here on the same communicators are silent
    for communicator in colrow.state_of(model).communicator.with_subgroups():
        communicator.__class__ = SilentCommunicator
    trainer = LimitTrainer(model)
    trainer.notes = settings()
    return trainer
