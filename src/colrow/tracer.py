"""What colrow asks of TorchDynamo, torch.compile's tracer, while it traces.

Each function runs during tracing and leaves nothing in the graph. What is noted belongs to the graph that is
being traced, and goes with it when tracing starts again or ends. The program's own objects are not written
to: in the body of a higher-order operator, such as activation checkpointing, that would break the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext

__all__ = [
    "comptime",
    "must_not_break",
    "notes",
    "outside_of_graphs",
    "recall",
    "remember",
    "sees_module_call",
    "traced_output",
    "while_tracing",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def while_tracing(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let ``function``, of constants, run where it is traced; the graph has its result as a constant."""
    decorated: Callable[Parameters, Result] = torch._dynamo.assume_constant_result(function)
    return decorated


def outside_of_graphs(reason: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Let torch.compile leave a function to Python: the graph breaks, or says why it cannot be whole."""
    decorator: Callable[..., Any] = torch.compiler.disable(reason=reason)
    return decorator


@while_tracing
def must_not_break() -> bool:
    """Whether the graph was asked for with ``fullgraph=True``."""
    return InstructionTranslator.current_tx().one_graph


def sees_module_call() -> bool:
    """Whether the call of a module that runs this hook is part of what is traced, not the hook alone."""
    file = nn.Module._call_impl.__code__.co_filename
    return any(frame.filename == file for frame in TracingContext.extract_stack())


def traced_output() -> OutputGraph:
    """The graph that is being traced."""
    return InstructionTranslator.current_tx().output


def notes(topic: str) -> dict[Any, Any]:
    """What has been noted of ``topic`` in the graph that is being traced."""
    found: dict[Any, Any] = vars(traced_output()).setdefault(f"colrow_{topic}", {})
    return found


def remember(context: ComptimeContext) -> None:
    """Through ``comptime``: note the caller's tensor ``result``, made from ``value``, under ``name``."""
    result = context.get_local("result")._i_will_not_complain_if_bc_breaks_VariableTracker()
    notes("results")[_key(context)] = result


def recall(context: ComptimeContext) -> None:
    """Through ``comptime``: the caller's ``result`` becomes what was noted for this ``value`` and ``name``.

    Unless nothing was, or ``value`` has been written to since.
    """
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    result = notes("results").get(_key(context))
    if result is not None:
        tracer.symbolic_locals["result"] = result


def _key(context: ComptimeContext) -> tuple[object, ...]:
    value, name = context.get_local("value"), context.get_local("name").as_python_constant()
    return value.as_proxy().node, value.as_fake()._version, name  # type: ignore[union-attr]
