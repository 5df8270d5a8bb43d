"""Everything that a model computes in one forward, with gradients: what the localiser compares.

A recording is a list of events in the order in which they happened. An event is a floating-point tensor at a
point of the program: the result of a call, or what a module was given or returned. The same tensor makes
several events, as the result of ``linear``, as the output of the layer and as the input of the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colrow.trace.functions import opened
from colrow.trace.tree import tensors_by_path, tensors_of
from colrow.verify.place import Place, caller, is_of_colrow, user_place

_UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Calls whose results are whatever the memory held."""


@dataclass
class Gradient:
    """The gradient of a tensor, once the backward pass has come there."""

    tensor: Tensor | None = None


@dataclass
class Event:
    """A tensor at a point of the program.

    Attributes:
        kind: the result of a ``call``, the ``input`` or the ``output`` of a module.
        key: tells the same point in the other model's recording.
        module: path of the module whose code made the call, or whose input or output it is.
        function: name of what was called.
        place: line of the user's program.
        value: a copy, made at this moment.
        gradient: see above; without a tensor if none came.
        sources: indices of the events that it was computed from, or that are the same tensor.
        parameters: names of the parameters among the arguments of the call.
    """

    kind: Literal["call", "input", "output"]
    key: Hashable
    module: str
    function: str
    place: Place
    value: Tensor
    gradient: Gradient
    sources: tuple[int, ...]
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.kind == "call":
            return f"{self.function} at {self.place}"
        return f"{self.kind} of {self.module or 'the model'}"


@dataclass
class Recording:
    """The events of one forward, and the parameters' gradients by name once the backward has run."""

    events: list[Event] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Running:
    """A module's forward under way."""

    path: str
    number: int
    inputs: tuple[int, ...] = ()


@contextmanager
def recorded(model: nn.Module) -> Iterator[Recording]:
    """Record what ``model`` does in this context; gradients as well, if a backward follows, even later."""
    mode = _Recorder(model)
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        # after the hooks of a plan: what it does to inputs and outputs belongs to the module
        hooks.append(module.register_forward_pre_hook(mode.enter_module(path), with_kwargs=True))
        hooks.append(module.register_forward_hook(mode.leave_module, always_call=True))
    try:
        with mode:
            yield mode.recording
    finally:
        for hook in hooks:
            hook.remove()
        mode.forget()


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.recording = Recording()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._running: list[_Running] = []
        self._passes: Counter[Hashable] = Counter()
        self.forget()

    def forget(self) -> None:
        """Let go of the tensors themselves; events have copies."""
        self._alive: list[Tensor] = []  # as long as their identities are used below
        self._latest: dict[int, int] = {}
        self._gradients: dict[tuple[int, int, bool], Gradient] = {}
        self._unwritten: set[int] = set()

    def enter_module(self, path: str) -> Any:
        """The hook for the begin of a module's forward."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running = _Running(path, self._passes[path])
            self._passes[path] += 1
            first = len(self.recording.events)
            with torch._C.DisableTorchFunction():
                for name, tensor in tensors_by_path([args, kwargs]):
                    key = ("input", path, running.number, *name)
                    self._add("input", key, path, "", tensor, self._events_of([tensor]))
            running.inputs = tuple(range(first, len(self.recording.events)))
            self._running.append(running)

        return hook

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook for the end of a module's forward, also of one that raised."""
        running = self._running.pop()
        with torch._C.DisableTorchFunction():
            for name, tensor in tensors_by_path(output):
                key = ("output", running.path, running.number, *name)
                sources = self._events_of([tensor]) or running.inputs
                self._add("output", key, running.path, "", tensor, sources)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        body = opened(function)
        if body is not None:
            with self:
                return body(*args, **keywords)
        result = function(*args, **keywords)
        if self._running and not is_of_colrow(function):
            with torch._C.DisableTorchFunction():
                self._call(function, args, keywords, result)
        return result

    def _call(self, function: Any, args: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        name = getattr(function, "__name__", "")
        if name == "__get__":  # of an attribute such as x.T
            name = getattr(function.__self__, "__name__", name)
            if name in ("grad", "data"):
                return
        if name in _UNWRITTEN:
            self._alive.append(result)
            self._unwritten |= {_memory(result)} - {0}
            return
        results = [args[0]] if name == "__setitem__" else tensors_of(result)
        # a call that returns its argument, as `to` and `contiguous` may, makes nothing new
        results = [
            one for one in results if (id(one), one._version, one.requires_grad) not in self._gradients
        ]
        results = [one for one in results if one.is_floating_point() or one.is_complex()]
        # views of memory that is written part by part; what is written is seen
        written = args[0] if args else None
        results = [one for one in results if one is written or _memory(one) not in self._unwritten]
        if not results:
            return
        running, place = self._running[-1], caller(function)
        given = tensors_of([args, keywords])
        sources = self._events_of(given)
        parameters = tuple(self._names[id(one)] for one in given if id(one) in self._names)
        point = ("call", running.path, running.number, place, name)
        number = self._passes[point]
        self._passes[point] += 1
        for index, tensor in enumerate(results):
            key = (*point, number, index)
            self._add("call", key, running.path, name, tensor, sources, parameters)

    def _events_of(self, tensors: list[Tensor]) -> tuple[int, ...]:
        return tuple(sorted({self._latest[id(one)] for one in tensors if id(one) in self._latest}))

    def _add(
        self,
        kind: Literal["call", "input", "output"],
        key: Hashable,
        module: str,
        function: str,
        tensor: Tensor,
        sources: tuple[int, ...],
        parameters: tuple[str, ...] = (),
    ) -> None:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return
        self._alive.append(tensor)
        self._latest[id(tensor)] = len(self.recording.events)
        gradient = self._gradient_of(tensor)
        value = tensor.detach().as_subclass(Tensor).clone()
        self.recording.events.append(
            Event(kind, key, module, function, user_place(), value, gradient, sources, parameters)
        )

    def _gradient_of(self, tensor: Tensor) -> Gradient:
        # what an autograd function computes wants a gradient only once the function has returned it
        version = (id(tensor), tensor._version, tensor.requires_grad)
        if version not in self._gradients:
            gradient = self._gradients[version] = Gradient()
            if tensor.requires_grad and id(tensor) not in self._names:

                def keep(given: Tensor) -> None:
                    gradient.tensor = given.detach().clone()

                tensor.register_hook(keep)
        return self._gradients[version]


def _memory(tensor: Tensor) -> int:
    """Tells tensors that share memory from others; 0 for those that have no memory of one piece."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
