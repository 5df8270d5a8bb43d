"""Running a stage: the model's own forward, in which only the stage's units compute.

Units of earlier stages return what was received, and placeholders for what no later unit reads; the first
unit of the next stage ends the forward.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from colrow.errors import PlanError
from colrow.forwards import OwnForward
from colrow.parallel.pipeline.layout import Stage
from colrow.parallel.pipeline.record import UnitCall
from colrow.trace.tree import Path, tensors_by_path

Shapes = Mapping[tuple[int, Path], tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of what units return, by the index of the call and the path in its result."""


class StageEnd(Exception):
    """The stage's last unit has computed: the model's forward is over.

    An ``Exception``, because torch calls forward hooks that are always to be called after those only.
    """


@dataclass
class Frame:
    """What all units of a rank share.

    Attributes:
        calls: all calls of units, in order.
        written: numbers of the memory that the model writes into.
        device: of placeholders.
        current: the run of a stage, while its forward is under way outside of units.
    """

    calls: Sequence[UnitCall]
    written: frozenset[int]
    device: torch.device
    current: Run | None = None


@dataclass
class Run:
    """One micro-batch's forward of one stage.

    Attributes:
        received: by index of value.
        shapes: of what earlier units return.
        captured: what the stage's units have returned for others, by index of value.
        returned: shapes of what the stage's units have returned.
    """

    frame: Frame
    stage: Stage
    received: dict[int, Tensor]
    shapes: Shapes
    captured: dict[int, Tensor] = field(default_factory=dict)
    returned: dict[tuple[int, Path], tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    position: int = 0

    def call(self, unit: UnitForward, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """What the unit gives to the model's forward."""
        calls, stage = self.frame.calls, self.stage
        if self.position >= len(calls) or calls[self.position].path != unit.path:
            expected = calls[self.position].path if self.position < len(calls) else "the end"
            raise PlanError(
                unit.path,
                f"it is called where the example of colrow.pipeline_parallel calls {expected}",
                "Give an example that takes the same course through the model.",
            )
        call = calls[self.position]
        self.position += 1
        if call.index >= stage.last:
            raise StageEnd
        if call.index < stage.first:
            return self._fill(call, arguments, keywords)
        self.frame.current = None  # what it calls is part of it
        try:
            result = unit.compute(arguments, keywords)
        finally:
            self.frame.current = self
        self._capture(call, result)
        return result

    def _capture(self, call: UnitCall, result: Any) -> None:
        sent = {value.index for value in self.stage.sends}
        tensors = dict(tensors_by_path(result, inside_result=True))
        for path, _, value in call.outputs:
            if path not in tensors:
                raise PlanError(
                    call.path,
                    f"it does not return a tensor at {path} as in the example of colrow.pipeline_parallel",
                    "Give an example that takes the same course through the model.",
                )
            tensor = tensors[path]
            self.returned[call.index, path] = (tuple(tensor.shape), tensor.dtype)
            if value.index in sent and value.index not in self.captured:
                self.captured[value.index] = tensor

    def _fill(self, call: UnitCall, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """What a unit of an earlier stage seems to return."""
        memo: dict[int, Any] = {}
        for path, tensor, value in call.outputs:
            if value.index in self.received:
                memo[id(tensor)] = self.received[value.index]
            elif value.index in call.given:
                memo[id(tensor)] = _argument(call.given[value.index], arguments, keywords)
            else:
                shape, dtype = self.shapes[call.index, path]
                blank = torch.zeros((), dtype=dtype, device=self.frame.device).expand(shape)
                memo[id(tensor)] = blank.clone() if value.storage in self.frame.written else blank
        for item, path in call.objects:
            memo[id(item)] = _argument(path, arguments, keywords)
        return copy.deepcopy(call.result, memo)

    def sent(self) -> list[Tensor]:
        """What the next stage is to receive.

        Raises:
            PlanError: if the model returned without calling all of the stage's units.
        """
        found = {**self.received, **self.captured}
        missing = [value for value in self.stage.sends if value.index not in found]
        if missing:
            raise PlanError(
                self.frame.calls[self.stage.first].path,
                "the model returned without calling all units of this stage",
                "Give colrow.pipeline_parallel an example that takes the same course through the model.",
            )
        return [found[value.index] for value in self.stage.sends]


def _argument(path: Path, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """What a unit was given at a path; positions are numbers, keywords names."""
    first, rest = path[0], path[1:]
    item = arguments[first] if isinstance(first, int) else keywords[first]
    return item if not rest else dict(tensors_by_path(item))[rest]


class UnitForward(OwnForward):
    """The forward of a unit in a pipeline."""

    def __init__(self, path: str, module: nn.Module, frame: Frame, is_held: bool) -> None:
        super().__init__(module)
        self.path, self._frame, self._is_held = path, frame, is_held

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        run = self._frame.current
        return self.compute(arguments, keywords) if run is None else run.call(self, arguments, keywords)

    def compute(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call the module's own forward.

        Raises:
            PlanError: if its parameters are on another rank.
        """
        if not self._is_held:
            raise PlanError(
                self.path,
                "it computes on another rank of the pipeline",
                "Call the pipeline that colrow.pipeline_parallel gave, not the model.",
            )
        return self._inner(arguments, keywords)


class Passing(torch.autograd.Function):
    """A value at the border of a stage: itself, contiguous, and no view, which schedules cannot detach."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
