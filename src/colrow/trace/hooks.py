"""Hooks that are shown gradients: on values within a forward, on modules, on parameters.

A hook is to see what it would see without a plan: the whole gradient of a whole value. Only what the program
does with a value *after* the hook got hold of it can be changed without the hook's noticing, so for a trace
the value is another one from there on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colrow.trace.errors import TraceError
from colrow.trace.recorder import Recorder
from colrow.trace.records import Operation, Source, Value, WrittenGradient, WrittenKind
from colrow.trace.sites import user_site

HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


def hooked(recorder: Recorder, tensor: Tensor) -> None:
    """A forward puts a hook on a tensor."""
    value = recorder.value_of(tensor)
    if tensor.is_leaf and value.source.kind != "result":
        name = value.source.name or value.source.kind
        recorder.warn(f"a hook is shown the gradient of {name}, which stays whole")
        recorder.trace.written.append(_hook(recorder, f"a hook on {name}", (value,), ()))
    else:
        recorder.warn(f"a hook is shown the gradient of a value {list(value.shape)}, which stays whole")
        _renew(recorder, tensor, value, "a hook on it")


def refuse_old_hooks(recorder: Recorder, module: nn.Module) -> None:
    """Modules may not have backward hooks of the old kind, which are shown what the last operator is given.

    Raises:
        TraceError: if this one has: where a plan changes a module's result, another operator is the last.
    """
    if module._is_full_backward_hook is False and module._backward_hooks:
        raise TraceError(
            recorder.module_path,
            str(user_site()),
            "it has a hook from register_backward_hook, which is shown the gradients of whichever operator "
            "comes last, and may come to be another one",
            "Use register_full_backward_hook, or put the hook on after parallelize",
        )


def passed_hook(recorder: Recorder, given: list[Tensor], results: list[Tensor], first: int) -> None:
    """PyTorch has handed a module's arguments or results through the function that calls its hooks."""
    _warn_of_module(recorder)
    inputs = tuple(recorder.value_of(tensor) for tensor in given)
    outputs = tuple(recorder.value_of(tensor) for tensor in results)
    written = _hook(recorder, "a backward hook of the module", inputs, outputs)
    written.first, written.last = first, len(recorder.trace.operations)
    recorder.trace.written.append(written)
    recorder.unhooked |= {after.index: before for before, after in zip(inputs, outputs, strict=True)}


def hooked_parameter(recorder: Recorder, name: str, value: Value, original: Tensor) -> None:
    """A parameter, or buffer, that may have been given hooks before."""
    if original._backward_hooks or getattr(original, "_post_accumulate_grad_hooks", None):
        recorder.trace.warnings.append(
            f"a hook is shown the gradient of {name}, which stays whole: put hooks on after parallelize if "
            "they may see the gradient of a part"
        )
        # a parameter's gradient is summed before it arrives where the hook is
        written = _hook(recorder, f"a hook on {name}", (value,), (), "parameter hook")
        recorder.trace.written.append(written)


def _warn_of_module(recorder: Recorder) -> None:
    path = recorder.module_path or "the model"
    text = f"{path} has backward hooks: its inputs and outputs stay whole"
    if text not in recorder.trace.warnings:
        recorder.trace.warnings.append(text)


def _hook(
    recorder: Recorder,
    name: str,
    inputs: tuple[Value, ...],
    outputs: tuple[Value, ...],
    kind: WrittenKind = "hook",
) -> WrittenGradient:
    count = len(recorder.trace.operations)
    site = None if recorder.module is None else user_site()
    return WrittenGradient(name, kind, inputs, outputs, recorder.module, count, count, site)


def _renew(recorder: Recorder, tensor: Tensor, value: Value, name: str) -> None:
    """From here on, the tensor is another value: an alias of what it was."""
    trace, table = recorder.trace, recorder.table
    if table.twin(tensor) is not tensor:
        trace.written.append(_hook(recorder, name, (value,), ()))
        return
    alias = table.add_detached(value.shape, value.dtype, Source("result"), value.storage, value.content)
    operation = Operation(
        len(trace.operations),
        torch.ops.aten.alias.default,
        (value,),
        {},
        (value,),
        (alias,),
        recorder.module,
        recorder.call,
    )
    written = _hook(recorder, name, (value,), (alias,))
    trace.operations.append(operation)
    written.last = len(trace.operations)
    trace.written.append(written)
    value.uses.append(operation)
    alias.producer = operation
    table.attach(alias, tensor)
    if recorder.module is not None and recorder.returned is recorder.module:
        recorder.unhooked[alias.index] = recorder.unhooked.get(value.index, value)
    recorder.gradients.follow((value,), (alias,))
