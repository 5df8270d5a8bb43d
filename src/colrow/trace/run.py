"""Recording a model: one eager run on meta tensors, watched from three sides."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from colrow.trace.attributes import traced_attributes
from colrow.trace.content import content_of_original
from colrow.trace.custom import recorded_functions
from colrow.trace.errors import TraceError
from colrow.trace.functions import FunctionMode
from colrow.trace.hooks import hooked_parameter
from colrow.trace.meta import is_on_meta, meta_arguments, meta_copy
from colrow.trace.modules import asking_logarithms, recorded_modules, scripted, unchecked_distributions
from colrow.trace.operators import OperatorMode
from colrow.trace.recomputed import recorded_checkpoints
from colrow.trace.recorder import Recorder, Routing
from colrow.trace.records import Kept, Source, Trace
from colrow.trace.repeat import Repeater
from colrow.trace.tree import Path, enclosed, tensors_by_path

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class Example:
    """Arguments of one call of a model.

    Integer and boolean tensors should have data, so that branches on them are known; floating-point tensors
    may be on the meta device.
    """

    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)


def trace(
    model: nn.Module,
    arguments: tuple[Any, ...] = (),
    keywords: Mapping[str, Any] | None = None,
    *,
    mode: str = "evaluation",
    routing: Routing = "error",
    copy_layers: bool = True,
) -> Trace:
    """Record one call of a model without computing anything.

    A model on the meta device is run as it is; of any other a copy on meta is. Either way the model is
    afterwards as it was: attributes, buffers, training flags.

    Args:
        model: any module.
        arguments, keywords: of the call; copied, never changed.
        mode: a name for what the example shows. ``training`` runs the model in training mode (with dropout),
            any other name in evaluation mode.
        routing: what happens where the program reads which experts were chosen: ``error``, or ``guess`` the
            first two, so that a loop over experts is passed; recorded in :attr:`Trace.warnings`.
        copy_layers: copy the record of a layer for its identical siblings instead of running them.

    Raises:
        TraceError: the program reads data that a trace does not have, or the model cannot be put on meta.
    """
    originals: dict[int, Tensor] = {}
    if not is_on_meta(model):
        model, originals = meta_copy(model)
    return _trace(model, originals, Example(arguments, keywords or {}), mode, routing, copy_layers)


def trace_all(
    model: nn.Module,
    examples: Mapping[str, Example],
    *,
    routing: Routing = "error",
    copy_layers: bool = True,
) -> dict[str, Trace]:
    """One trace for each mode: training with labels, evaluation, first and later steps of generation, ...

    See :func:`trace`; the examples' names are the modes.
    """
    originals: dict[int, Tensor] = {}
    if not is_on_meta(model):
        model, originals = meta_copy(model)
    return {
        mode: _trace(model, originals, example, mode, routing, copy_layers)
        for mode, example in examples.items()
    }


def trace_together(
    model: nn.Module,
    examples: Mapping[str, Example],
    *,
    routing: Routing = "error",
    copy_layers: bool = True,
    originals: dict[int, Tensor] | None = None,
) -> Trace:
    """One trace of all examples, one after the other: what they have in common is parameters and buffers.

    What holds of it holds of every mode, as a plan must. See :func:`trace_all`; the runs are told apart by
    :attr:`Trace.runs`.

    Args:
        originals: of a copy on meta, what :func:`colrow.trace.meta.meta_copy` gave with it.
    """
    if not is_on_meta(model):
        model, originals = meta_copy(model)
    recorder = Recorder(", ".join(examples), routing)
    with _all_differentiable(model):
        _register_model(recorder, model, originals or {})
        for mode, example in examples.items():
            _run(recorder, model, example, mode, copy_layers)
        recorder.finish()
    return recorder.trace


def _trace(
    model: nn.Module,
    originals: dict[int, Tensor],
    example: Example,
    mode: str,
    routing: Routing,
    copy_layers: bool,
) -> Trace:
    recorder = Recorder(mode, routing)
    _register_model(recorder, model, originals)
    _run(recorder, model, example, mode, copy_layers)
    recorder.finish()
    return recorder.trace


@contextmanager
def _all_differentiable(model: nn.Module) -> Iterator[None]:
    """Frozen parameters may be trained later: here they carry gradients like the others."""
    frozen = [one for one in model.parameters() if not one.requires_grad and one.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _run(recorder: Recorder, model: nn.Module, example: Example, mode: str, copy_layers: bool) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise scripted("")
    (arguments, keywords), given = meta_arguments((example.arguments, _distinct(example)))
    first = len(recorder.trace.modules)
    with ExitStack() as stack:
        stack.enter_context(traced_attributes(model, recorder.escape))
        # attributes first: they put the training flags back
        model.train(mode == "training")
        _register_inputs(recorder, model, arguments, keywords, given)
        repeater = Repeater(recorder, model, copy_layers)
        stack.enter_context(recorded_modules(recorder, repeater))
        stack.enter_context(recorded_functions(recorder))
        stack.enter_context(recorded_checkpoints(recorder))
        stack.enter_context(asking_logarithms())
        stack.enter_context(unchecked_distributions())
        stack.enter_context(_no_fast_path())
        if "torch._dynamo" in sys.modules:
            # parts that are compiled run as they were written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(OperatorMode(recorder))
        stack.enter_context(FunctionMode(recorder))
        try:
            result = model(*arguments, **keywords)
        except TraceError:
            raise
        except Exception as error:
            where = recorder.failed_in or "the model itself"
            error.colrow_module = recorder.failed_in  # type: ignore[attr-defined]
            error.add_note(f"This happened while colrow recorded {where} on meta tensors ({mode}).")
            raise
        trace = recorder.trace
        with recorder.pause():
            trace.outputs += recorder.values_by_path(result, inside_objects=True)
            trace.kept += _kept(recorder, model, (arguments, keywords))
        # detached results are recorded when they are met
        trace.modules[first].last = len(trace.operations)
        trace.runs.append((mode, trace.modules[first]))


def _kept(recorder: Recorder, model: nn.Module, given: Any) -> list[Kept]:
    """What the run has computed and left where others find it."""
    found: list[tuple[str, Tensor]] = []
    for path, module in model.named_modules():
        for name, item in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            kind = "a forward hook" if name in _FORWARD_HOOKS else f"the attribute {name}"
            label = f"{kind} of {path or 'the model'}"
            found += [(label, tensor) for _, tensor in tensors_by_path([item, enclosed(item)])]
    found += [("", tensor) for _, tensor in tensors_by_path(given)]
    values = [(label, recorder.table.find(tensor)) for label, tensor in found]
    return [
        Kept(label or "what the caller gives", value, not label)
        for label, value in values
        if value is not None and value.producer is not None
    ]


def _distinct(example: Example) -> dict[str, Any]:
    """The keywords of a call; ids that are given as labels too, the same tensor, are two values then.

    Floating-point tensors stay what they are: that queries are the keys may be what a model asks.
    """
    seen = {id(argument) for argument in example.arguments}
    keywords = dict(example.keywords)
    for name, item in keywords.items():
        if isinstance(item, Tensor) and not item.is_floating_point() and id(item) in seen:
            keywords[name] = item.clone()
        seen.add(id(item))
    return keywords


def _register_model(recorder: Recorder, model: nn.Module, originals: dict[int, Tensor]) -> None:
    def register(kind: str, name: str, tensor: Tensor) -> None:
        if recorder.table.find(tensor) is None:
            original = originals.get(id(tensor), tensor)
            source = Source("parameter" if kind == "parameter" else "buffer", name)
            value = recorder.table.add(tensor, source, content_of_original(original))
            recorder.gradients.begin(value, tensor)
            hooked_parameter(recorder, name, value, original)

    for name, parameter in model.named_parameters():
        register("parameter", name, parameter)
    for name, buffer in model.named_buffers():
        register("buffer", name, buffer)
    for path, module in model.named_modules():
        for name, item in vars(module).items():
            if isinstance(item, Tensor):
                register("buffer", f"{path}.{name}" if path else name, item)


def _register_inputs(
    recorder: Recorder,
    model: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    given: dict[int, Tensor],
) -> None:
    names = _positional_names(model, len(arguments))
    named: list[tuple[Path, Tensor]] = []
    for name, argument in [*zip(names, arguments, strict=True), *keywords.items()]:
        found = tensors_by_path(argument, inside_objects=True)
        named += [((name, *path), tensor) for path, tensor in found]
    for path, tensor in named:
        if recorder.table.find(tensor) is None:
            source = Source("input", ".".join(map(str, path)))
            value = recorder.table.add(tensor, source, content_of_original(given[id(tensor)]))
            recorder.gradients.begin(value, tensor)


def _positional_names(model: nn.Module, count: int) -> list[str]:
    """Names of a forward's positional arguments; numbers where it does not name them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return [*names[:count], *map(str, range(len(names), count))]


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without torch's fused transformer layers, which hide their operators, in this context."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
