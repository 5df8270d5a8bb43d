"""The state of a run on one rank: model, optimizer, data, and how many steps are done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colrow.checkpoint import save_optimizer, save_pretrained
from colrow.mesh import data_part
from colrow.state import parallel_module
from colrow.train.budget import Budget
from colrow.train.build import all_ranks, build, device_of
from colrow.train.configuration import TrainConfiguration
from colrow.train.data import DataOrder
from colrow.train.folder import Checkpoints, RunFolder, read_state
from colrow.train.prepare import open_sequences, read_prepared


class Run:
    """New, or as the latest checkpoint left it. Every rank makes one.

    Args:
        configuration: of the run, whose folder has been prepared.
        mesh: the ranks.

    Raises:
        ValueError: if this rank does not see the folder.

    Attributes:
        ranks: all ranks.
        model: what the training loop calls: the cut model with its replicas.
        cut: the cut model itself.
        done: number of steps done.
        budget: number of steps of the training.
        checkpoint: what it was resumed from, if it was.
    """

    def __init__(self, configuration: TrainConfiguration, mesh: DeviceMesh) -> None:
        self.configuration, self.mesh = configuration, mesh
        self.folder = RunFolder(configuration.run_folder)
        self.ranks = all_ranks()
        self.is_first = self.ranks.rank == 0
        self.device = device_of(mesh)
        self._checkpoints = Checkpoints(
            self.folder.checkpoints,
            configuration.keep_checkpoints,
            self.is_first,
            lambda: self.ranks.barrier(label="checkpoint"),
        )
        self.checkpoint = self._checkpoints.latest() if configuration.resume else None
        state = read_state(self.checkpoint) if self.checkpoint else {}
        self.done: int = state.get("step", 0)
        self._saved = self.done
        data = read_prepared(self.folder)
        if data is None:
            raise ValueError(
                f"rank {self.ranks.rank} does not see the data in {self.folder.data}: "
                "run_dir must be on a file system that all hosts share"
            )
        self.model, self.optimizer = build(configuration, self.folder, mesh, self.checkpoint)
        self.cut: Any = parallel_module(self.model)
        self.training, self.validation = open_sequences(self.folder, configuration.data, data.vocab_size)
        self._order = DataOrder(len(self.training), configuration.batch_size, configuration.seed)
        steps = configuration.steps if configuration.steps is not None else state.get("steps")
        self.budget = Budget(steps, configuration.minutes, self._evaluation_share())

    def batch(self) -> Tensor:
        """This replica's token ids of the next step: [sequences of a replica, sequence_length]."""
        size = self.configuration.replica_batch
        first = data_part(self.mesh)[0] * size
        return self.training.take(self._order.indices(self.done)[first : first + size]).to(self.device)

    def validation_batches(self) -> Iterator[tuple[Tensor, bool]]:
        """This replica's validation sequences, as many at a time as in training, and whether they count.

        As many for every replica, so that they compute together: some take what another counts.
        """
        if self.validation is None:
            return
        count = self._evaluation_sequences()
        # a pipeline divides what it is given into micro-batches
        size = (
            self.configuration.micro_batch
            if self.configuration.mesh.pp == 1
            else self.configuration.replica_batch
        )
        batches = [range(first, min(first + size, count)) for first in range(0, count, size)]
        part, parts = data_part(self.mesh)
        for first in range(0, len(batches), parts):
            own = first + part
            yield self.validation.take(batches[min(own, len(batches) - 1)]), own < len(batches)

    def _evaluation_sequences(self) -> int:
        if self.validation is None:
            return 0
        return min(len(self.validation), self.configuration.evaluate_sequences or len(self.validation))

    def _evaluation_share(self) -> float:
        """Cost of validating, per step and in steps: only the forward, a third of the work."""
        sequences = self._evaluation_sequences()
        return sequences / self.configuration.batch_size / 3 / self.configuration.evaluate_every

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this step."""
        if self._saved == self.done:
            return

        def write(folder: Path) -> None:
            save_pretrained(self.model, folder / "model")
            save_optimizer(self.model, self.optimizer, folder / "optimizer")

        self._checkpoints.save(self.done, write, {"step": self.done, "steps": self.budget.steps})
        self._saved = self.done

    def gather(self, number: int) -> list[int]:
        """One number of every rank, in rank order, on all of them."""
        token = torch.tensor([number], device=self.device)
        return self.ranks.all_gather(token, 0, label="numbers to show").tolist()
