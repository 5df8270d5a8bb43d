"""One stage of a pipeline as a module: what torch's schedules call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from colrow.apply.sequence import SequenceLength
from colrow.errors import PlanError
from colrow.modules import names_by_parameter
from colrow.parallel.context.door import door_of
from colrow.parallel.pipeline.layout import Stage
from colrow.parallel.pipeline.live import Substituting
from colrow.parallel.pipeline.run import Frame, Passing, Run, Shapes, StageEnd
from colrow.state import state_of
from colrow.trace.tree import Path, tensors_by_path


class StageModule(nn.Module):
    """Runs a stage on one micro-batch of those that are set.

    Args:
        model: whose forward runs; not a submodule, since several stages of a rank share it.
        frame: of the model.
        stage: which of its units compute.
        is_last: whether the model's result is this stage's.
        loss: path of the loss in the model's result.

    Attributes:
        shapes: of what earlier units return.
        known_lengths: of sequences that are cut over tensor-parallel ranks, by name.
        passed: attentions and losses of each stage, as far as they are known, where sequences are cut over
            ranks of ``cp``.
        losses: of the last stage, the loss of each micro-batch of this step.
    """

    def __init__(
        self, model: nn.Module, frame: Frame, stage: Stage, is_last: bool, loss: Path | None
    ) -> None:
        super().__init__()
        self._model = (model,)
        self._frame, self._stage, self._is_last, self._loss = frame, stage, is_last, loss
        self.shapes: Shapes = {}
        self.known_lengths: Mapping[str, int] = {}
        self.passed: Sequence[tuple[int, int]] = ()
        self.losses: list[Tensor] = []
        self._tied = {
            name
            for known in names_by_parameter(model).values()
            if known[0] in stage.parameters
            for name in known
        }
        self._batches: Sequence[Mapping[str, Any]] = ()
        self._shares: Sequence[float] = ()
        self._keep: Callable[[int, Any], None] | None = None

    def begin(
        self,
        batches: Sequence[Mapping[str, Any]],
        shares: Sequence[float],
        shapes: Shapes,
        lengths: Mapping[str, int],
        passed: Sequence[tuple[int, int]],
        keep: Callable[[int, Any], None] | None = None,
    ) -> None:
        """A step begins.

        Args:
            batches: the micro-batches: keywords of the model's forward.
            shares: what the loss of each counts; none for an evaluation.
            shapes: of what earlier units return.
            lengths: of sequences that are cut, by name.
            passed: attentions and losses of each stage.
            keep: takes the number of a micro-batch and what the model returned, on the last stage.
        """
        self.losses = []
        self._batches, self._shares, self._keep = batches, shares, keep
        self.shapes, self.known_lengths, self.passed = shapes, lengths, passed

    def end(self) -> None:
        """The step is over: let go of its batch."""
        self.begin((), (), {}, {}, ())

    @property
    def model(self) -> nn.Module:
        return self._model[0]

    @property
    def sequences(self) -> Mapping[str, SequenceLength]:
        """Sequences that are cut over tensor-parallel ranks, by name."""
        return state_of(self.model).lengths

    @property
    def device(self) -> torch.device:
        return self._frame.device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the stage: a schedule that divides backward passes asks for them."""
        found: dict[int, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            # FSDP may have another object in one of a tied parameter's places
            if name in self._tied:
                found[id(parameter)] = parameter
        yield from found.values()

    @property
    def units(self) -> list[str]:
        """Paths of the units that compute."""
        calls = self._frame.calls[self._stage.first : self._stage.last]
        return list(dict.fromkeys(call.path for call in calls))

    def forward(self, *received: Tensor, micro_batch: Tensor) -> Any:
        """What the next stage receives, a tuple; on the last stage the loss of a micro-batch times its share.

        Args:
            received: the values that cross into this stage, in order.
            micro_batch: [1], its number.
        """
        number = int(micro_batch)
        run, output = self.run(received, self._batches[number])
        if not self._is_last:
            return tuple(Passing.apply(tensor) for tensor in run.sent())
        if self._keep is not None:
            self._keep(number, output)
            return torch.zeros((), device=self.device)
        loss, share = self.loss_of(output), self._shares[number]
        self.losses.append(loss.detach().double())
        return loss * share if share else self._nothing(received)

    def run(self, received: tuple[Tensor, ...], batch: Mapping[str, Any]) -> tuple[Run, Any]:
        """The model's forward up to the stage's end, and what it returned."""
        values = {
            value.index: Passing.apply(tensor)
            for value, tensor in zip(self._stage.receives, received, strict=True)
        }
        run = Run(self._frame, self._stage, values, self.shapes)
        self._note_lengths()
        self._note_course()
        output: Any = None
        self._frame.current = run
        try:
            with self._substituting(run):
                output = self.model(**batch)
        except StageEnd:
            pass
        finally:
            self._frame.current = None
        self._check_course()
        return run, output

    def _substituting(self, run: Run) -> AbstractContextManager[object]:
        """A context in which values between units are as received, where some cross the stage's borders."""
        if not self._stage.places:
            return nullcontext()
        frame = self._frame
        return Substituting(
            self._stage.places, run.received, run.captured.__setitem__, lambda: frame.current is run
        )

    def _note_lengths(self) -> None:
        """Sequences that are cut over tensor-parallel ranks are whole on the first stage only."""
        for name, length in self.known_lengths.items():
            self.sequences[name].parts(length)

    @property
    def course(self) -> tuple[int, int]:
        """Attentions and losses of the last run, where sequences are cut over ranks of ``cp``."""
        door = door_of(self.model)
        return (0, 0) if door is None else door.passed

    def _note_course(self) -> None:
        """What a call does is known of the whole model: tell it what earlier stages do of it."""
        door = door_of(self.model)
        if door is not None:
            before = self.passed[: self._stage.index]
            door.before = (sum(one[0] for one in before), sum(one[1] for one in before))

    def _check_course(self) -> None:
        """The last stage has taken for granted that earlier ones do what they did when shapes were found."""
        index = self._stage.index
        if index < len(self.passed) and self.course != self.passed[index]:
            raise PlanError(
                self._frame.calls[self._stage.first].path,
                f"this stage has done {self.course[0]} attentions and {self.course[1]} losses over tokens, "
                f"and {self.passed[index][0]} and {self.passed[index][1]} for a batch of this shape before; "
                "sequences are cut over ranks (cp), and what the model does in other calls is not known",
                "Let what the model does not depend on the numbers in a batch, or make the mesh without cp.",
            )

    def loss_of(self, output: Any) -> Tensor:
        """The loss in what the model returned.

        Raises:
            PlanError: if there is none.
        """
        found = None if self._loss is None else tensor_at(output, self._loss)
        if found is None:
            raise PlanError(
                "",
                "it returned no loss: a pipeline's step takes a batch for which the model computes one",
                "Give labels, in the example of colrow.pipeline_parallel and in each batch.",
            )
        return found

    def _nothing(self, received: tuple[Tensor, ...]) -> Tensor:
        """A loss of zero that gives gradients of zero: the mean over no tokens is no number."""
        wanting = [tensor for tensor in received if tensor.requires_grad]
        if not wanting:
            return torch.zeros((), device=self._frame.device, requires_grad=True) * 1
        return torch.stack([(tensor * 0).sum() for tensor in wanting]).sum()


def tensor_at(item: Any, path: Path) -> Tensor | None:
    """The tensor at a path of what a model returned; ``None`` if there is none."""
    for found, tensor in tensors_by_path(item, inside_objects=True):
        if found == path:
            return tensor
    return None
