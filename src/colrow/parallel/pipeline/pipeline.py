"""A model in stages on several ranks: one object that is stepped as one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage

from colrow.collectives import Communicator
from colrow.collectives.failure import rank_failure_behind, transport_error_behind
from colrow.collectives.pending import Step
from colrow.collectives.position import compute_meanwhile
from colrow.collectives.statistics import Call
from colrow.errors import PlanError
from colrow.layers.later import WeightGradients
from colrow.parallel.pipeline.agree import agree
from colrow.parallel.pipeline.evaluate import merge_results, run_forward
from colrow.parallel.pipeline.gradients import SharedGradients
from colrow.parallel.pipeline.layout import StageLayout
from colrow.parallel.pipeline.rehearse import BatchShapes, rehearse, signature
from colrow.parallel.pipeline.schedules import idle_share, schedule_kind
from colrow.parallel.pipeline.stage import StageModule, tensor_at
from colrow.parallel.pipeline.weights import Weigh, divided, equal_weight, shares_of
from colrow.trace.tree import Path


@dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline's forward gives.

    Attributes:
        loss: of the whole batch, a float64 scalar, on every rank; ``None`` if the model computed none.
        output: on the ranks of the last stage what the model returned for the whole batch, ``None`` in the
            place of what only other stages computed; ``None`` on all others.
    """

    loss: Tensor | None
    output: Any


@dataclass(frozen=True)
class PipelineReport:
    """How a pipeline's ranks work together.

    Attributes:
        stages: for each stage of this rank the first and the last of its units, in words.
        idle_share: of a step, in which a rank has nothing to do if all stages cost the same; ``None`` where
            the schedule is not known to have one.
        waited_share: of the last step's seconds, in which this rank did not compute, as its processor saw it.
        bytes_sent: to other stages in the last step, by this rank.
    """

    stages: tuple[str, ...]
    idle_share: float | None
    waited_share: float | None
    bytes_sent: int


class Replicas(Protocol):
    """What is done with the gradients of replicas."""

    def begin(self) -> None:
        """A forward or a step begins."""

    def end(self) -> None:
        """It has ended."""

    def finish(self, syncs: bool, sum_shared: Callable[[], None], put_back: Callable[[], None]) -> None:
        """Average a step's gradients over replicas, or leave that to a later step.

        Args:
            syncs: whether to do it now.
            sum_shared: sums those that several stages hold, and is called unless ``put_back`` is.
            put_back: puts those of earlier steps back.
        """


class _Clock:
    """Seconds that this rank computed."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        try:
            return compute_meanwhile(function, *arguments, **keywords)
        finally:
            self.seconds += time.perf_counter() - begin


class _Stage(PipelineStage):
    """torch's stage, whose computations are timed.

    Attributes:
        clock: times them.
        later: takes what backward passes leave for later, where the schedule divides them.
    """

    clock: _Clock
    later: WeightGradients | None

    def _compute(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        with nullcontext() if self.later is None else self.later.collecting():
            return self.clock.time(function, *arguments, **keywords)

    def clear_runtime_states(self) -> None:
        """A step begins: nothing is left of one that failed."""
        super().clear_runtime_states()
        if self.later is not None:
            self.later.take()

    def forward_one_chunk(self, *arguments: Any, **keywords: Any) -> Any:
        return self._compute(super().forward_one_chunk, *arguments, **keywords)

    def backward_one_chunk(self, *arguments: Any, **keywords: Any) -> Any:
        return self._compute(super().backward_one_chunk, *arguments, **keywords)

    def backward_weight_one_chunk(self, *arguments: Any, **keywords: Any) -> Any:
        return self.clock.time(super().backward_weight_one_chunk, *arguments, **keywords)


class Pipeline(nn.Module):
    """A model whose layers are divided over the ``pp`` ranks of a mesh; see :func:`colrow.pipeline_parallel`.

    Attributes:
        model: with the parameters of this rank's stages.
        micro_batches: how many a batch is divided into.
        layout: which stage has what, and on which rank.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        ranks: Communicator,
        layout: StageLayout,
        modules: Mapping[int, StageModule],
        shared: SharedGradients,
        schedule: str,
        micro_batches: int,
        weigh: Weigh | None,
        names: Sequence[str],
        loss: Path | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.micro_batches = micro_batches
        self._mesh, self._ranks, self.layout, self._stages = mesh, ranks, layout, dict(modules)
        self._shared, self._schedule, self._weigh, self._names = shared, schedule, weigh, tuple(names)
        self._loss = loss
        self._device = next(iter(modules.values())).device
        self._shapes: dict[tuple[Any, ...], BatchShapes] = {}
        self._made: tuple[BatchShapes, Any] | None = None
        self._clock = _Clock()
        self._waited: float | None = None
        self._sent_bytes = 0
        self._replicas: Replicas | None = None
        self._syncs = True

    def step(self, batch: Mapping[str, Any], weight: float = 1.0) -> Tensor:
        """Forward and backward of a batch: adds gradients to ``.grad`` on every rank, as one device would.

        Their objective is the model's loss for the whole batch: the mean over all its labels, however they
        are spread over micro-batches.

        Args:
            batch: keywords of the model's forward, the same on all ranks of a replica. Tensors are divided
                into micro-batches along dimension 0.
            weight: what the loss is multiplied by for the gradients. With replicas,
                ``colrow.token_weight(mesh, tokens) * tokens``, which is 0 where no label counts.

        Returns:
            The loss of the batch, not weighted: a float64 scalar, on every rank.

        Raises:
            ValueError: if the batch cannot be divided into equal micro-batches, no label counts, or the ranks
                of the pipeline are given different batches or weights.
            PlanError: if the model computes no loss, or calls its layers in another order than its example.
            RankFailure: if another rank died, raised or did not come in time.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("a pipeline's step computes gradients: call it outside of torch.no_grad()")
        parts = divided(batch, self.micro_batches)
        if self._weigh is None:
            raise PlanError(
                "",
                "the example of colrow.pipeline_parallel gave no loss, so there is nothing to train",
                "Give an example with labels.",
            )
        shares = shares_of(self._weigh, parts, counts=weight != 0)
        trained = self._agreed(batch, weight)
        kept = self._shared.set_aside()
        if self._replicas is not None:
            self._replicas.begin()
        shapes = self._shapes_for(parts[0], trained)
        schedule = self._schedule_for(shapes)
        for module in self._stages.values():
            module.begin(
                parts, [share * weight for share in shares], shapes.returned, shapes.lengths, shapes.passed
            )
        # the numbers of the micro-batches, which the schedule divides, stand for what each stage has already
        numbers = torch.arange(self.micro_batches)
        self._waited = self._run(
            lambda: schedule.step(micro_batch=numbers, target=numbers, return_outputs=False)
        )
        if self._replicas is None:
            self._shared.sum(kept)
        else:
            self._replicas.finish(
                self._syncs, lambda: self._shared.sum(kept), lambda: self._shared.put_back(kept)
            )
            self._replicas.end()
        self._sent_bytes = self._bytes_sent(shapes)
        last = self._stages.get(len(self.layout.stages) - 1)
        terms = (
            [share * loss for share, loss in zip(shares, last.losses, strict=True) if share] if last else []
        )
        loss = self._from_last(sum(terms, torch.zeros((), dtype=torch.float64)))
        for module in self._stages.values():
            module.end()
        return loss

    def forward(self, **batch: Any) -> PipelineOutput:
        """The model's loss and result for a batch, without gradients.

        Args:
            batch: as :meth:`step` takes it.

        Raises:
            RuntimeError: if gradients are enabled.
            ValueError: if the batch cannot be divided into equal micro-batches, or the ranks of the pipeline
                are given different ones.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a pipeline is called for evaluation, within torch.no_grad(); to train, call its step(batch)"
            )
        parts = divided(batch, self.micro_batches)
        self._agreed(batch, 1.0)
        if self._replicas is not None:
            self._replicas.begin()
        shapes = self._shapes_for(parts[0])
        results: dict[int, Any] = {}
        for module in self._stages.values():
            module.begin(parts, [], shapes.returned, shapes.lengths, shapes.passed, results.__setitem__)
        self._run(lambda: run_forward(self.layout, self._stages, self._ranks, shapes, self.micro_batches))
        for module in self._stages.values():
            module.end()
        if self._replicas is not None:
            self._replicas.end()
        return self._merged(parts, [results[number] for number in sorted(results)])

    def units(self) -> list[nn.Module]:
        """The modules that compute on this rank, in order."""
        found: dict[str, nn.Module] = {}
        for module in self._stages.values():
            for path in module.units:
                found.setdefault(path, self.model.get_submodule(path))
        return list(found.values())

    def set_replicas(self, replicas: Replicas) -> None:
        """Let gradients be averaged over replicas after each step."""
        self._replicas = replicas

    @contextmanager
    def without_sync(self) -> Iterator[None]:
        """Gradients of steps in this context stay where they are; see :func:`colrow.no_gradient_sync`."""
        self._syncs = False
        try:
            yield
        finally:
            self._syncs = True

    def report(self) -> PipelineReport:
        """What this rank's stages are, how long it waits and how much it sends."""
        kind = schedule_kind(self._schedule)
        share = idle_share(kind, self._ranks.size, len(self._stages), self.micro_batches)
        return PipelineReport(self._names, share, self._waited, self._sent_bytes)

    def _shapes_for(self, batch: Mapping[str, Any], trained: tuple[int, ...] = ()) -> BatchShapes:
        key = (*signature(batch, self.model.training, self._device.type), trained)
        if key not in self._shapes:
            self._shapes[key] = rehearse(self.layout, self._stages, self._ranks, batch, self._device)
        return self._shapes[key]

    def _agreed(self, batch: Mapping[str, Any], weight: float) -> tuple[int, ...]:
        """What :func:`agree` gives: gradients that are sent depend on which parameters are trained."""
        call = (signature(batch, self.model.training, self._device.type), float(weight))
        names = [name for name, one in self.model.named_parameters() if one.requires_grad]
        return agree(self._ranks, self._device, batch, call, names)

    def _schedule_for(self, shapes: BatchShapes) -> Any:
        """torch's schedule, with buffers for what is received: those of the last shapes are kept."""
        if self._made is not None and self._made[0] is shapes:
            return self._made[1]
        kind = schedule_kind(self._schedule)
        stages = []
        for index, module in sorted(self._stages.items()):
            received = shapes.sent[index - 1] if index else ()
            sent = shapes.sent[index] if index + 1 < len(self.layout.stages) else None
            loss = torch.zeros((), device="meta", requires_grad=True)
            later = WeightGradients() if kind.splits else None
            stage = _Stage(
                module,
                index,
                len(self.layout.stages),
                self._device,
                input_args=tuple(one.blank("meta") for one in received),
                output_args=(loss,) if sent is None else tuple(one.blank("meta") for one in sent),
                group=self._ranks.group,
                dw_builder=None if later is None else later.take,
            )
            stage.clock, stage.later = self._clock, later
            stages.append(stage)
        given = stages[0] if kind.single else stages
        schedule = kind.make(given, self.micro_batches, loss_fn=_given_loss, scale_grads=False)
        self._made = (shapes, schedule)
        return schedule

    def _run(self, function: Callable[[], None]) -> float:
        """Run a schedule; gives the share of the time in which this rank did not compute.

        What a stage raised is raised as it was.
        """
        errors: list[BaseException] = []

        def attempt() -> None:
            try:
                function()
            except Exception as error:
                if rank_failure_behind(error) is None and transport_error_behind(error) is not None:
                    raise RuntimeError(str(transport_error_behind(error))) from error
                errors.append(error)

        self._clock.seconds = 0.0
        step = Step(Call("send_recv", "a step of the pipeline", "", 0), self._ranks.global_ranks)
        step.wait(attempt)
        if errors:
            (error,) = errors
            raise rank_failure_behind(error) or _own_error(error)
        return max(0.0, 1 - self._clock.seconds / step.seconds)

    def _bytes_sent(self, shapes: BatchShapes) -> int:
        total = 0
        rank_of = self.layout.rank_of
        for index in self._stages:
            if index + 1 < len(rank_of) and rank_of[index + 1] != rank_of[index]:
                total += sum(one.bytes for one in shapes.sent[index])
            if index and rank_of[index - 1] != rank_of[index]:
                total += sum(one.bytes for one in shapes.sent[index - 1] if one.requires_grad)
        return total * self.micro_batches

    def _from_last(self, number: Tensor) -> Tensor:
        """A number of the last stage's rank, on all."""
        own = number.detach().to(self._device, torch.float64).reshape(1)
        source = self.layout.rank_of[-1]
        return self._ranks.broadcast(own, source, label="loss of the pipeline").reshape(())

    def _merged(self, parts: Sequence[Mapping[str, Any]], results: Sequence[Any]) -> PipelineOutput:
        """One result of those of all micro-batches."""
        losses = [tensor_at(one, self._loss) for one in results] if self._loss is not None else []
        has_loss = bool(losses) and all(one is not None for one in losses)
        known = self._from_last(torch.tensor(float(has_loss))).item() > 0
        loss: Tensor | None = None
        if known:
            shares = shares_of(self._weigh or equal_weight, parts)
            total = torch.zeros((), dtype=torch.float64)
            for share, one in zip(shares, losses, strict=False):
                if share and one is not None:
                    total = total + share * one.detach().double().cpu()
            loss = self._from_last(total)
        output = None
        if results:
            last = self.layout.stages[-1]
            output = merge_results(results, last.outputs, last.lacking, loss, self._loss)
        return PipelineOutput(loss, output)


def _given_loss(output: Tensor, target: Tensor) -> Tensor:
    """The last stage returns the loss."""
    return output


def _own_error(error: BaseException) -> BaseException:
    """What a stage raised, around which torch puts errors of its own that show its tensors."""
    while (
        type(error) is RuntimeError and "failed to run" in str(error).lower() and error.__cause__ is not None
    ):
        error = error.__cause__
    return error
