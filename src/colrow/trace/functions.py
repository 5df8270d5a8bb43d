"""The function mode: calls of torch functions by the program, and sizes as traced integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from colrow.trace.hooks import HOOKS, hooked
from colrow.trace.integers import Expression, Size, TracedInt
from colrow.trace.recorder import Recorder
from colrow.trace.records import FunctionCall, Operation
from colrow.trace.sites import call_site, user_site
from colrow.trace.tree import map_leaves

_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
_READS = ("tolist", "numpy", "__array__")
_POSITIONS = ("aten::arange", "aten::linspace", "aten::range", "aten::logspace")
"""Operators whose numbers are extents of their result."""


def is_integer(dtype: torch.dtype) -> bool:
    """Whether numbers of a type can be sizes."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def is_vectorised() -> bool:
    """Whether ``torch.vmap`` or another transform runs, whose tensors stand for one of many."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def opened(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The body of a torch function whose own calls need to be seen one by one; None for all others.

    ``F.multi_head_attention_forward`` reshapes by numbers of its arguments and of their sizes, so that no
    change of its arguments makes it work on some of the heads; its calls can be changed.
    """
    if function is not F.multi_head_attention_forward:
        return None
    body = function.__code__
    # the same code, so the same call sites, without the question that would lead back to the mode
    globals_ = {**function.__globals__, "has_torch_function": lambda *_: False}
    return FunctionType(body, globals_, function.__name__, function.__defaults__)


def begin_call(
    recorder: Recorder, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> FunctionCall:
    """The record of a call that is about to happen."""
    assert recorder.module is not None
    return FunctionCall(
        len(recorder.trace.calls),
        function,
        recorder.snapshot(arguments),
        recorder.snapshot(keywords),
        recorder.module,
        call_site(function),
        user_site(),
        len(recorder.trace.operations),
    )


def end_call(recorder: Recorder, call: FunctionCall, result: Any) -> None:
    """Complete the record of a call that has given ``result``."""
    call.outputs = recorder.snapshot(result)
    call.last = len(recorder.trace.operations)
    place = (call.module.index, id(call.site.code), call.site.instruction)
    call.occurrence = recorder.occurrences[place]
    recorder.occurrences[place] += 1


class FunctionMode(TorchFunctionMode):
    """Records calls of torch functions."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        recorder = self.recorder
        inside = recorder.call is not None and recorder.call is not recorder.custom
        if recorder.paused or inside or is_vectorised():
            return function(*args, **keywords)
        name = getattr(function, "__name__", "")
        if name in HOOKS and args and isinstance(args[0], Tensor):
            handle = function(*args, **keywords)
            hooked(recorder, args[0])
            return handle
        if name in ("__get__", "size", "numel", "nelement"):
            size = self._size(function, name, args, keywords)
            if size is not None:
                return size
            if name == "__get__":
                return function(*args, **keywords)
        if name in _READS and args and isinstance(args[0], Tensor):
            return self._read(name, args, keywords)
        if function is Tensor.item:
            return self._item(args, keywords)
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor, torch.asarray):
            function, args, keywords = self._constant(function, args, keywords)
        elif name in ("__getitem__", "__setitem__"):
            args = (args[0], _list_indices(args[1]), *args[2:])
        body = opened(function)
        if body is not None:
            with self:
                return body(*args, **keywords)
        return self._call(function, args, keywords)

    def _call(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        recorder = self.recorder
        trace = recorder.trace
        outer, custom = recorder.call, recorder.custom
        call = begin_call(recorder, function, arguments, keywords)
        if outer is None:
            trace.calls.append(call)
            recorder.call = call
        # what the code of a program's own function calls is part of the call of that function: nothing can be
        # changed there, for its backward would not know
        recorder.custom = None
        try:
            result = function(*arguments, **keywords)
        finally:
            recorder.call, recorder.custom = outer, custom
        call.last = len(trace.operations)
        if outer is None:
            if call.last == call.first:
                trace.calls.pop()
                return result
            written = getattr(function, "__name__", "") == "__setitem__"
            end_call(recorder, call, arguments[0] if written else result)
        self._numeric_uses(call)
        return result

    def _item(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        number = self._call(Tensor.item, arguments, keywords)
        value = self.recorder.table.find(arguments[0])
        if value is None or type(number) is not int:
            return number
        return self.recorder.extent(number, "item()", value)

    # integers

    def _size(self, function: Any, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Sizes that remember which tensor they came from; None for anything else."""
        if name == "__get__" and function != _SHAPE:
            return None
        value = self.recorder.table.find(arguments[0])
        if value is None:
            return None
        sizes = [self._traced(Size(value.index, position, n)) for position, n in enumerate(value.shape)]
        if name in ("numel", "nelement"):
            return math.prod(sizes)
        dimension = keywords.get("dim", arguments[1] if len(arguments) > 1 else None)
        return torch.Size(sizes) if dimension is None else sizes[dimension]

    def _traced(self, expression: Expression) -> TracedInt:
        return TracedInt(expression.value, expression, self.recorder.escape)

    def _numeric_uses(self, call: FunctionCall) -> None:
        """Report integers that reached an operator as a number rather than as an extent or a dimension."""
        integers = _traced_integers((call.arguments, call.keywords))
        if not integers:
            return
        for operation in self.recorder.trace.operations[call.first : call.last]:
            for number in _numbers(operation):
                for integer in integers:
                    if int.__eq__(integer, number) is True or number == float(int.__index__(integer)):
                        integer.escape(operation.name)

    # constants and reads

    def _constant(
        self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Constants are made on the CPU, where their content stays known."""
        for integer in _traced_integers((arguments, keywords)):
            self.recorder.escape(integer.expression, "torch.tensor")
        if function is Tensor.new_tensor:
            keywords = {"dtype": arguments[0].dtype, **keywords}
            function, arguments = torch.tensor, arguments[1:]
        data = arguments[0] if arguments else next(iter(keywords.values()))
        if isinstance(data, Tensor):
            return function, arguments, keywords
        arguments, keywords = map_leaves((arguments, keywords), self._as_number)
        return function, arguments, {**keywords, "device": "cpu"}

    def _as_number(self, leaf: Any) -> Any:
        """An element of a list of numbers: integers as they are, tensors as what they hold."""
        return self._read("item", (leaf,), {}) if isinstance(leaf, Tensor) else _untraced(leaf)

    def _read(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        recorder = self.recorder
        value = recorder.value_of(arguments[0])
        if value.content is None:
            listed = name == "tolist" and is_integer(value.dtype)
            recorder.guess(f"{name}()", value, counts=listed)
        with recorder.pause():
            content = recorder.imagination.content_of(value)
            found = getattr(content.clone(), name)(*arguments[1:], **keywords)
        return map_leaves(
            found, lambda leaf: recorder.extent(leaf, f"{name}()", value) if type(leaf) is int else leaf
        )


def _traced_integers(item: Any) -> list[TracedInt]:
    found: list[TracedInt] = []

    def collect(leaf: Any) -> Any:
        if isinstance(leaf, TracedInt):
            found.append(leaf)
        return leaf

    map_leaves(item, collect)
    return found


def _untraced(leaf: Any) -> Any:
    return int.__int__(leaf) if isinstance(leaf, TracedInt) else leaf


def _numbers(operation: Operation) -> list[Any]:
    """The plain numbers that an operator computes with."""
    schema = operation.function._schema
    if schema.name in _POSITIONS:
        return []
    found = []
    for position, argument in enumerate(schema.arguments):
        if position < len(operation.arguments):
            given = operation.arguments[position]
        else:
            given = operation.keywords.get(argument.name)
        computed = str(argument.type).removeprefix("Optional[").rstrip("]") in ("number", "float", "Tensor")
        if computed and isinstance(given, int | float) and not isinstance(given, bool):
            found.append(given)
    return found


def _list_indices(index: Any) -> Any:
    """Lists of integers among indices become tensors here, where their content is seen."""

    def change(item: Any) -> Any:
        if isinstance(item, list) and item and all(type(each) in (int, TracedInt) for each in item):
            return torch.tensor(item)
        return item

    return tuple(change(item) for item in index) if isinstance(index, tuple) else change(index)
