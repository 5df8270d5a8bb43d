"""Calls of the program's own ``torch.autograd.Function`` while a model is recorded.

Such a function has a backward that was written, not derived from its operators. Its operators are recorded
like others, but they belong to one call, that of the function: what is changed must be changed for forward
and backward together, and that can be done to its arguments and results only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.function import Function, _SingleLevelFunction
from torch.nn.modules._functions import BackwardHookFunction

from colrow.trace.content import LARGEST
from colrow.trace.functions import begin_call, end_call, is_vectorised
from colrow.trace.hooks import passed_hook
from colrow.trace.listening import FUNCTIONS, Proceed, listening
from colrow.trace.recorder import Recorder
from colrow.trace.records import FunctionCall, Value, WrittenGradient, WrittenKind
from colrow.trace.sites import user_site
from colrow.trace.tree import map_leaves, tensors_of
from colrow.trace.trial import Given, Trial

_OPERATORS = "torch._library.autograd"
"""Where PyTorch makes the functions of custom operators."""

_DERIVED = ("torch.", "colrow.")
"""Modules whose functions have gradients that are known to be right."""


def is_custom(call: FunctionCall) -> bool:
    """Whether the call is of a function of the program with a backward of its own."""
    owner = getattr(call.function, "__self__", None)
    return isinstance(owner, type) and issubclass(owner, _SingleLevelFunction)


@contextmanager
def recorded_functions(recorder: Recorder) -> Iterator[None]:
    """Record the calls of autograd functions in this context."""

    def listen(given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed) -> Any:
        function: type = given[0]
        if recorder.paused:
            return proceed(*given, **keywords)
        if function is BackwardHookFunction:
            return _hooks(recorder, given, proceed)
        if function.__module__ == _OPERATORS:
            return _operator(recorder, given, keywords, proceed)
        # vmap makes functions of the program's
        is_derived = function.__module__.startswith(_DERIVED) and "_functorch" not in function.__module__
        if is_derived or recorder.call is not None or is_vectorised():
            return proceed(*given, **keywords)
        return _function(recorder, given, keywords, proceed)

    with listening(FUNCTIONS, listen):
        yield


def _hooks(recorder: Recorder, arguments: tuple[Any, ...], proceed: Proceed) -> Any:
    first = len(recorder.trace.operations)
    result = proceed(*arguments)
    passed_hook(recorder, tensors_of(arguments), tensors_of(result), first)
    return result


def _operator(
    recorder: Recorder, arguments: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed
) -> Any:
    """A custom operator, of which one operation is recorded."""
    first = len(recorder.trace.operations)
    result = proceed(*arguments, **keywords)
    operations = recorder.trace.operations[first:]
    if len(operations) == 1 and any(tensor.requires_grad for tensor in tensors_of(result)):
        operation = operations[0]
        wanted = {id(recorder.value_of(one)): one.requires_grad for one in tensors_of(arguments)}

        def given(leaf: Any) -> Any:
            return _given(leaf, wanted.get(id(leaf), False)) if isinstance(leaf, Value) else leaf

        own, names = map_leaves((operation.arguments, operation.keywords), given)
        trial = Trial(operation.function, None, own, names)
        _note(recorder, operation.name, "operator", arguments, result, first, trial)
    return result


def _function(recorder: Recorder, given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed) -> Any:
    trace = recorder.trace
    function: type = given[0]
    arguments = given[1:]
    apply: Callable[..., Any] = function.apply  # type: ignore[attr-defined]
    call = begin_call(recorder, apply, arguments, keywords)
    trace.calls.append(call)
    wanted = {id(tensor): tensor.requires_grad for tensor in tensors_of((arguments, keywords))}
    recorder.call = recorder.custom = call
    try:
        result = proceed(*given, **keywords)
        recorder.snapshot(result)  # among them may be what is recorded when it is used
    finally:
        recorder.call = recorder.custom = None
    if len(trace.operations) == call.first:
        trace.calls.pop()
        return result
    end_call(recorder, call, result)
    if any(tensor.requires_grad for tensor in tensors_of(result)):

        def described(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return _given(recorder.value_of(leaf), wanted.get(id(leaf), False))
            return leaf

        own, names = map_leaves((arguments, keywords), described)
        trial = Trial(apply, _forward(function), own, names)
        _note(recorder, function.__qualname__, "function", (arguments, keywords), result, call.first, trial)
    return result


def _given(value: Value, differentiable: bool) -> Given:
    known = None if value.content is None or value.content.numel() > LARGEST >> 8 else value.content
    return Given(value.shape, value.dtype, differentiable, None if differentiable else known)


def _note(
    recorder: Recorder,
    name: str,
    kind: WrittenKind,
    arguments: Any,
    result: Any,
    first: int,
    trial: Trial,
) -> None:
    operations = recorder.trace.operations[first:]
    made = {id(value) for operation in operations for value in operation.outputs}
    inputs = {value.index: value for value in map(recorder.value_of, tensors_of(arguments))}
    # also what it reads without being given it
    inputs |= {one.index: one for each in operations for one in each.inputs if id(one) not in made}
    outputs = {value.index: value for value in map(recorder.value_of, tensors_of(result))}
    recorder.trace.written.append(
        WrittenGradient(
            name,
            kind,
            tuple(inputs.values()),
            tuple(outputs.values()),
            recorder.module,
            first,
            len(recorder.trace.operations),
            user_site(),
            trial,
        )
    )


class _Context:
    """What a function's forward is given when it runs by itself: keeps nothing."""

    def __init__(self, needed: tuple[bool, ...]) -> None:
        self.needs_input_grad = needed
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None: ...

    def mark_dirty(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _forward(function: type) -> Callable[..., Any]:
    """The forward of a function as plain code, which autograd follows."""

    def forward(*arguments: Any, **keywords: Any) -> Any:
        plain: Any = function
        if plain.setup_context is not Function.setup_context:
            return plain.forward(*arguments, **keywords)
        needed = tuple(isinstance(one, Tensor) and one.requires_grad for one in arguments)
        return plain.forward(_Context(needed), *arguments, **keywords)

    return forward
