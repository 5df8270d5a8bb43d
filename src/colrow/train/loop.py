"""The training loop, as every rank runs it."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.data_shards import own_class
from colrow.launch.environment import restarts
from colrow.train.build import all_ranks, device_of
from colrow.train.configuration import TrainConfiguration
from colrow.train.data import derived_seed
from colrow.train.display import Display, make_display
from colrow.train.finish import finish
from colrow.train.metrics import MetricsWriter, StepRecord, ValidationRecord, peak_memory_bytes
from colrow.train.model import without_cache
from colrow.train.parse import from_dictionary
from colrow.train.prepare import prepare, record_steps
from colrow.train.run import Run
from colrow.train.schedule import learning_rate
from colrow.train.step import accumulate_gradients, mean_loss, optimizer_step
from colrow.train.traffic import Traffic

_MEMORY_EVERY = 10


def train(configuration: dict[str, Any], prepared: bool) -> dict[str, Any]:
    """One rank's part of a training run; the ranks together make the run's folder.

    Args:
        configuration: the fields of a :class:`TrainConfiguration`, nested.
        prepared: whether :func:`colrow.train.prepare.prepare` has been called for it.

    Returns:
        ``steps``, the last ``loss`` (``None`` if no step was left), and the last ``validation_loss``
        (``None`` without validation).

    Raises:
        ValueError: what :func:`prepare` raises, or if the loss is not finite.
        RankFailure: if another rank dies or comes too late.
    """
    chosen = from_dictionary(configuration)
    if restarts():  # the launcher has started all ranks again after one has failed: the run goes on
        chosen = dataclasses.replace(chosen, resume=True, overwrite=False)
    mesh = colrow.init_mesh(
        chosen.mesh.tp,
        chosen.mesh.dp,
        pp=chosen.mesh.pp,
        ep=chosen.mesh.ep,
        cp=chosen.mesh.cp,
        timeout=chosen.timeout,
    )
    if not prepared:
        _prepare_on_first_rank(chosen, mesh)
    run = Run(chosen, mesh)
    # sequences that are cut over ranks were recorded with one
    cache = without_cache(run.cut) if chosen.mesh.cp == 1 else nullcontext()
    with make_display(run.is_first) as display, Trainer(run, display) as trainer, cache:
        trainer.train()
    finish(run, trainer.traffic)
    validation = trainer.last_validation
    return {
        "steps": run.done,
        "loss": trainer.last_loss,
        "validation_loss": validation.loss if validation else None,
    }


def _prepare_on_first_rank(configuration: TrainConfiguration, mesh: DeviceMesh) -> None:
    """What another process would have done before it started the ranks; a mistake is told once."""
    ranks, mistake = all_ranks(), None
    if ranks.rank == 0:
        try:
            print(*prepare(configuration), sep="\n", flush=True)
        except ValueError as error:
            mistake = error
    failed = torch.tensor([mistake is not None], dtype=torch.int32, device=device_of(mesh))
    if ranks.all_reduce(failed, "max", label="prepare the data").item():
        if mistake is None:
            sys.exit(2)
        raise mistake


class Trainer:
    """Steps, validations and checkpoints of a run, and their records. A context manager: it closes files.

    Args:
        run: whose steps are to be done.
        display: what the user sees.
    """

    def __init__(self, run: Run, display: Display) -> None:
        self.run, self.display = run, display
        self.configuration = run.configuration
        self.metrics = MetricsWriter(run.folder, run.done) if run.is_first else None
        self.last_loss: float | None = None
        self.last_validation: ValidationRecord | None = None
        self._memory: list[int] = []
        chosen = self.configuration
        micro_batches = math.ceil(chosen.replica_batch / chosen.micro_batch)
        self.traffic = Traffic(run.model, run.mesh, chosen.mesh, micro_batches)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        if self.metrics is not None:
            self.metrics.close()

    def train(self) -> None:
        """All steps that are left, with validations and checkpoints, and both at the end."""
        run, every = self.run, self.configuration.checkpoint_every
        if run.checkpoint is not None:
            self.display.say(f"resuming after step {run.done} from {run.checkpoint}")
        elif self.configuration.resume:
            self.display.say(f"nothing to resume in {run.folder.path}: starting from the beginning")
        while run.budget.steps is None or run.done < run.budget.steps:
            self._step()
            if run.done % self.configuration.evaluate_every == 0 and run.done != run.budget.steps:
                self._validate()
            if every and run.done % every == 0:
                run.save()
        self._validate()
        run.save()

    def _step(self) -> None:
        run, configuration = self.run, self.configuration
        is_measured = run.done % _MEMORY_EVERY == 0 or not self.traffic.bytes
        if is_measured:
            self.traffic.begin()
        begin, communicated = time.perf_counter(), colrow.comm_stats().seconds
        # dropout is a function of the seed and the step, like the data: resuming needs no more
        colrow.manual_seed(derived_seed(configuration.seed, "step", run.done), run.mesh)
        batch = run.batch()
        if configuration.mesh.ep > 1:
            colrow.reset_expert_loads(run.model)
        loss = accumulate_gradients(
            run.model, batch, configuration.micro_batch, configuration.precision, run.mesh
        ).item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of step {run.done + 1} is {loss}: lower optimizer.learning_rate or "
                "optimizer.max_norm, and --resume from the last checkpoint or start anew"
            )
        rate = learning_rate(configuration.optimizer, run.done, run.budget.steps)
        norm = optimizer_step(run.model, run.optimizer, rate, configuration.optimizer.max_norm).item()
        seconds = time.perf_counter() - begin
        if is_measured:
            self.traffic.end()
        run.done += 1
        self.last_loss = loss
        record = StepRecord(
            step=run.done,
            loss=loss,
            grad_norm=norm,
            lr=rate,
            tokens_per_second=batch.numel() * configuration.mesh.data_parts / seconds,
            peak_memory_bytes=peak_memory_bytes(run.device.type),
            comm_fraction=(colrow.comm_stats().seconds - communicated) / seconds,
            expert_load=self._expert_load(),
        )
        self._show(record, seconds)

    def _expert_load(self) -> float | None:
        """How uneven the experts' tokens were in this step."""
        if self.configuration.mesh.ep == 1:
            return None
        loads = colrow.expert_loads(self.run.model)
        return max((float(one.max() / one.double().mean()) for one in loads.values()), default=None)

    def _show(self, record: StepRecord, seconds: float) -> None:
        run = self.run
        if self.metrics is not None:
            self.metrics.write(record)
        if run.budget.tick(run.done, seconds, run.ranks, run.device):
            self.display.say(f"{self.configuration.minutes:g} minutes are {run.budget.steps} steps here")
            if run.is_first:
                record_steps(self.configuration, run.budget.steps)
        if run.done % _MEMORY_EVERY == 1 or not self._memory:
            self._memory = run.gather(record.peak_memory_bytes)
        self.display.step(record, self._memory, run.budget.steps)

    def _validate(self) -> None:
        run = self.run
        if run.validation is not None:
            batches = run.validation_batches()
            loss = mean_loss(run.model, batches, self.configuration.precision, run.device, run.mesh)
            self.last_validation = ValidationRecord(run.done, loss, math.exp(min(loss, 700.0)))
            if self.metrics is not None:
                self.metrics.write(self.last_validation)
            self.display.validation(self.last_validation)
        if self.metrics is not None:
            from colrow.report.curve import plot_losses  # only the first rank need wait for matplotlib

            total = colrow.count_parameters(run.model).total
            name, mesh = own_class(run.cut).__name__, self.configuration.mesh
            title = f"{name}, {total / 1e6:.1f} M parameters, {mesh}"
            training, validation = self.metrics.losses(StepRecord), self.metrics.losses(ValidationRecord)
            plot_losses(run.folder.curve, training, validation, title)
