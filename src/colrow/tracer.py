"""What colrow asks of TorchDynamo, torch.compile's tracer, while it traces.

Each function runs during tracing and leaves nothing in the graph.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
import torch._dynamo
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._subclasses import FakeTensor

__all__ = [
    "comptime",
    "must_not_break",
    "note_version",
    "refuse_other_version",
    "traced_graph",
    "traced_output",
    "while_tracing",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def while_tracing(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let ``function``, of constants, run where it is traced; the graph has its result as a constant."""
    decorated: Callable[Parameters, Result] = torch._dynamo.assume_constant_result(function)
    return decorated


def traced_output() -> OutputGraph:
    """The graph that is being traced."""
    return InstructionTranslator.current_tx().output


def must_not_break() -> bool:
    """Whether the graph was asked for with ``fullgraph=True``."""
    return InstructionTranslator.current_tx().one_graph


@while_tracing
def traced_graph() -> int:
    """A negative number that stands for the graph that is being traced."""
    number: int = vars(traced_output()).setdefault("colrow_number", -2 - secrets.randbits(60))
    return number


def note_version(context: ComptimeContext) -> None:
    """Through ``comptime``: remember how often the caller's tensor ``value`` has been written to."""
    value = cast(FakeTensor, context.get_local("value").as_fake())
    vars(value)["colrow_version"] = value._version


def refuse_other_version(context: ComptimeContext) -> None:
    """Through ``comptime``: break the graph if ``value`` has been written to since it was noted."""
    value = cast(FakeTensor, context.get_local("value").as_fake())
    if vars(value)["colrow_version"] != value._version:
        context.graph_break("a value is written to between two layers that share its entry")
