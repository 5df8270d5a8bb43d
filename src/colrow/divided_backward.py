"""Which gradients a backward pass is for, where a pipeline's schedule divides it.

The gradients of a stage's inputs are computed first, those of its weights later, when there would be nothing
else to do (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", https://arxiv.org/abs/2401.10241). Both passes
go through the nodes of layers. torch's own operators learn which gradients of a node are wanted; functions
written in Python learn only which of their inputs ever have one: they would compute all of them twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

Pass = Literal["input", "weight"]

# of the process: autograd computes in threads of its own, and a pipeline does one pass at a time
_current: Pass | None = None


@contextmanager
def divided_backward(kind: Pass) -> Iterator[None]:
    """A context for the pass of a stage's inputs, or that of its weights, by ``torch.autograd.grad``."""
    global _current
    before, _current = _current, kind
    try:
        yield
    finally:
        _current = before


def wanted_gradients(context: Any) -> tuple[bool, ...]:
    """``needs_input_grad`` of an autograd function's context, without what this pass is not for."""
    needs: tuple[bool, ...] = context.needs_input_grad
    if _current is None:
        return needs
    nodes = iter([node for node, _ in context.next_functions if node is not None])
    return tuple(one and _is_wanted(next(nodes), _current) for one in needs)


def _is_wanted(node: Any, kind: Pass) -> bool:
    leaf = getattr(node, "variable", None)
    if leaf is None:
        executed: bool = torch._C._will_engine_execute_node(node)
        return executed
    # the engine does not tell of leaves; those that are no parameters are a stage's inputs
    return isinstance(leaf, nn.Parameter) == (kind == "weight")
