"""The recorder: a trace in the making, and what runs at the moment."""

from __future__ import annotations

import linecache
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

from colrow.trace import content
from colrow.trace.errors import TraceError
from colrow.trace.gradients import Gradients
from colrow.trace.imagination import Imagination
from colrow.trace.integers import Expression, TracedInt
from colrow.trace.integers import Literal as Number
from colrow.trace.origins import REASONS, Origins
from colrow.trace.records import Escape, FunctionCall, ModuleCall, Source, Trace, Value
from colrow.trace.sites import user_site
from colrow.trace.tree import Path, map_tensors, tensors_by_path
from colrow.trace.values import ValueTable

Routing = Literal["error", "guess"]

GUESSED = ": guessed what "
"""What every warning of a guess has in it."""


class Recorder:
    """What the modes that watch a run share.

    Attributes:
        trace: what has been recorded so far.
        table: its values by tensor.
        routing: whether to guess which experts are chosen.
        module, call: the module and function call that run now.
        custom: the call, if it is that of a ``torch.autograd.Function``, whose code is the program's.
        failed_in: path of the module whose forward raised.
        paused: nothing is recorded while this is true.
        unrecorded: what records an operator by the ``id`` of its result; called when the result is used.
        occurrences: how often each place (module call, code, instruction) was passed.
        gradients: which values carry one.
        returned: the module call that runs, once its forward is over and only its hooks are left.
        unhooked: what the forward of a module returned by the index of what hooks made of it.
        checkpoints: how many checkpoints the program runs in.
        kept_after: after how many operators something was kept for a backward pass, and within how many
            checkpoints.
        imagination: made-up content, where ``routing`` is to be guessed.
        origins: what values follow from, and hence whether they may be made up.
    """

    def __init__(self, mode: str, routing: Routing = "error") -> None:
        self.trace = Trace(mode)
        self.table = ValueTable(self.trace.values)
        self.gradients = Gradients(self.table)
        self.origins = Origins(self.table)
        self.routing = routing
        self.imagination = Imagination()
        self.module: ModuleCall | None = None
        self.call: FunctionCall | None = None
        self.custom: FunctionCall | None = None
        self.paused = False
        self.failed_in = ""
        self.unrecorded: dict[int, Callable[[], None]] = {}
        self.returned: ModuleCall | None = None
        self.unhooked: dict[int, Value] = {}
        self.checkpoints = 0
        self.kept_after: list[tuple[int, int]] = []
        self.occurrences: dict[tuple[int, int, int], int] = defaultdict(int)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing in this context."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def finish(self) -> None:
        """The last run is over: let go of all tensors, though integers of the trace know this recorder."""
        self.gradients.finish(self.trace.operations)
        self.paused = True
        self.table = ValueTable([])
        self.gradients = Gradients(self.table)
        self.origins = Origins(self.table)
        self.unrecorded.clear()

    @property
    def module_path(self) -> str:
        """Path of the module that runs now; empty for the model itself."""
        return self.module.path if self.module is not None else ""

    def guess(self, use: str, value: Value, *, counts: bool = False) -> None:
        """The program reads data that is not known: note that it goes on with something guessed.

        Args:
            use: what reads it, for people.
            value: what is read.
            counts: whether it only says how many there are of something: the course of the program is the
                same whatever it is.

        Raises:
            TraceError: if nothing is to be guessed, or the program's course depends on data.
        """
        origin = self.origins.of(value)
        if self.routing == "error" or not (origin.is_guessed or counts):
            raise self.data_needed(use, value)
        reason = REASONS.get(origin, "what the program does is the same however many are chosen")
        value.read = (len(self.trace.operations), str(user_site()))
        self.trace.guessed.add(self.module_path)
        self.warn(f"{use} finds in a tensor {list(value.shape)}: {reason}", GUESSED)

    def extent(self, number: int, use: str, value: Value) -> int:
        """A number that was read: if it is of data, a size may follow from it, and nothing else."""
        if value.content is not None or self.origins.of(value).is_guessed:
            return number

        def refuse(_: Expression, further: str) -> None:
            if not self.paused:
                raise self.data_needed(f"the {further} of what {use} reads", value)

        return TracedInt(number, Number(number), refuse)

    def value_of(self, tensor: Tensor) -> Value:
        """The value of a tensor; one that was made outside of the trace becomes a constant."""
        value = self.table.find(tensor)
        if value is not None:
            return value
        if id(tensor) in self.unrecorded:
            with self.pause():
                self.unrecorded.pop(id(tensor))()
            return self.value_of(tensor)
        known: Tensor | None = None
        if tensor.is_meta:
            self.warn(
                f"a tensor of shape {list(tensor.shape)} is no parameter, buffer or attribute of a module: "
                "taken as a constant"
            )
        elif tensor.numel() <= content.LARGEST:
            with self.pause():
                known = tensor.detach().cpu().clone()
        with self.pause():
            value = self.table.add(tensor, Source("constant"), known)
        self.gradients.begin(value, tensor)
        return value

    def snapshot(self, item: Any) -> Any:
        """The same nesting with values in place of tensors."""
        return map_tensors(item, self.value_of)

    def values_by_path(
        self, item: Any, *, inside_objects: bool = False, inside_result: bool = False
    ) -> list[tuple[Path, Value]]:
        """The values of the tensors in a nesting; see :func:`colrow.trace.tree.tensors_by_path`."""
        found = tensors_by_path(item, inside_objects=inside_objects, inside_result=inside_result)
        return [(path, self.value_of(tensor)) for path, tensor in found]

    def warn(self, message: str, verb: str = ": ") -> None:
        """Note something that a person should know, once."""
        text = f"{user_site()}, in {self.module_path or 'the model itself'}{verb}{message}"
        if text not in self.trace.warnings:
            self.trace.warnings.append(text)

    def escape(self, expression: Expression, use: str) -> None:
        """An integer was used as a number."""
        if not self.paused:
            self.trace.escapes.append(Escape(expression, use, self.module, user_site()))

    def data_needed(self, use: str, value: Value) -> TraceError:
        """The error for a program that reads data which a trace does not have."""
        size = "" if value.shape else ", a single number,"
        site = user_site()
        source = linecache.getline(site.file, site.line).strip()
        where = f" in `{source}`" if source else ""
        what = "that follows from weights or from inputs without data; a trace has shapes only"
        remedy = (
            "Give integer and boolean inputs as real tensors; replace the branch by torch.where or a mask, "
            "or decide before the model is called and pass what was decided as a Python value"
        )
        if self.origins.of(value).is_guessed:
            remedy += (
                "; for a loop over the experts that tokens are routed to, pass routing='guess' or choose an "
                "implementation without such a loop"
            )
        else:
            what += ", and another course that the program may take would not be seen"
        return TraceError(
            self.module_path,
            str(site),
            f"{use}{where} needs the data of a tensor {list(value.shape)}{size} {what}",
            remedy,
        )
