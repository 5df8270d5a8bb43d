"""Module calls, seen through ``nn.Module.__call__`` while a model is recorded."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from colrow.trace.errors import TraceError
from colrow.trace.functions import is_vectorised
from colrow.trace.hooks import refuse_old_hooks
from colrow.trace.integers import TracedInt
from colrow.trace.recorder import Recorder
from colrow.trace.records import ModuleCall
from colrow.trace.repeat import Repeater
from colrow.trace.sites import user_site

_LOGARITHMS = ("log", "log2", "log10", "log1p", "isqrt")


@contextmanager
def recorded_modules(recorder: Recorder, repeater: Repeater) -> Iterator[None]:
    """Record the calls of the model's modules in this context.

    Modules that are not part of the model, such as a loss made and called in one line, belong to their
    caller.
    """
    original = nn.Module.__call__
    thread = threading.get_ident()

    def call(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        path = repeater.path(module)
        if path is None or recorder.paused or threading.get_ident() != thread:
            return original(module, *arguments, **keywords)
        copied = repeater.copy(module, (arguments, keywords))
        if copied is not None:
            return copied.result
        if is_vectorised():
            raise TraceError(
                path,
                str(user_site()),
                "the module is called within torch.vmap, torch.func.grad or another transform of torch.func, "
                "whose tensors stand for many: its dimensions cannot be followed",
                "Call the module on the whole batch, or take derivatives with torch.autograd.grad",
            )
        if isinstance(module, torch.jit.ScriptModule):
            recorder.warn(
                f"{type(module).__name__} {path} is scripted: nothing can be changed within it, so that what "
                "it holds stays whole; script it afterwards, or give the module that it was made from"
            )
        trace = recorder.trace
        record = ModuleCall(
            len(trace.modules),
            path,
            recorder.module,
            len(trace.operations),
            inputs=recorder.values_by_path(arguments) + recorder.values_by_path(keywords),
            type_name=type(module).__name__,
        )
        trace.modules.append(record)
        before = repeater.before(module, (arguments, keywords))
        outer_call, recorder.module, recorder.call = recorder.call, record, None
        try:
            refuse_old_hooks(recorder, module)
            with _noting_return(recorder, module, record):
                result = original(module, *arguments, **keywords)
            # what a plan changes is changed where the forward ends, before any hooks
            record.outputs = [
                (each, recorder.unhooked.get(value.index, value))
                for each, value in recorder.values_by_path(result, inside_result=True)
            ]
        except BaseException as error:
            recorder.failed_in = recorder.failed_in or path
            if isinstance(module, torch.jit.ScriptModule) and isinstance(error, RuntimeError):
                raise scripted(path) from error
            raise
        finally:
            recorder.module, recorder.call = record.parent, outer_call
            record.last = len(trace.operations)
        if before is not None:
            repeater.remember(module, record, (arguments, keywords), result, before)
        return result

    lookup = nn.Module.__getattr__

    def read(module: nn.Module, name: str) -> Any:
        item = lookup(module, name)
        if isinstance(item, Tensor) and not recorder.paused and threading.get_ident() == thread:
            value = recorder.table.find(item)
            if value is not None and isinstance(item, nn.Parameter):
                recorder.trace.read.add(value.index)
            elif value is not None:
                recorder.origins.read(value)
        return item

    nn.Module.__call__, nn.Module.__getattr__ = call, read  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = original, lookup  # type: ignore[method-assign]


def scripted(path: str) -> TraceError:
    """The error for a scripted module that cannot be recorded."""
    return TraceError(
        path,
        str(user_site()),
        "the module is scripted (torch.jit), and cannot be recorded: its code is not Python's, and may need "
        "data that a trace does not have",
        "Give the module that it was made from; colrow's plans are for eager modules and torch.compile",
    )


@contextmanager
def _noting_return(recorder: Recorder, module: nn.Module, record: ModuleCall) -> Iterator[None]:
    """The recorder knows in this context when the module's forward is over and its forward hooks begin."""
    if not module._forward_hooks:
        yield
        return

    def note(*_: Any) -> None:
        recorder.returned = record

    handle = module.register_forward_hook(note, prepend=True)
    try:
        yield
    finally:
        handle.remove()
        recorder.returned = None


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """``torch.distributions`` do not read their parameters' data to check them in this context."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def asking_logarithms() -> Iterator[None]:
    """The functions of ``math`` that read integers without converting them report the use in this context."""
    kept = {name: getattr(math, name) for name in _LOGARITHMS}

    def asking(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*numbers: Any) -> Any:
            for number in numbers:
                if isinstance(number, TracedInt):
                    number.escape(f"math.{name}")
            return function(*numbers)

        return ask

    try:
        for name, function in kept.items():
            setattr(math, name, asking(name, function))
        yield
    finally:
        for name, function in kept.items():
            setattr(math, name, function)
