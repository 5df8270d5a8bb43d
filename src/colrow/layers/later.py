"""Gradients of weights that a backward pass leaves for later.

Schedules of pipelines that divide backward passes send the gradients of a stage's inputs on first, and
compute those of its weights when there is nothing else to do (Qi et al. 2023, "Zero Bubble Pipeline
Parallelism", https://arxiv.org/abs/2401.10241). Here one backward pass computes everything but the products
for the weights of linear layers, which is most of what can wait: each layer puts its product down, to be
computed and added to the weight's ``.grad`` later. (torch's own stages divide the graph in place of the work.
That goes through the nodes of layers twice, and cannot be done where several values cross between stages, or
where gradients of several weights meet in one node.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# of the process: autograd computes in threads of its own, and a pipeline runs one stage at a time
_collecting: WeightGradients | None = None


class WeightGradients:
    """What the backward passes of a stage have left to do."""

    def __init__(self) -> None:
        self._left: deque[tuple[nn.Parameter, Callable[[], Tensor]]] = deque()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """A context for forwards whose backwards leave something, and for these."""
        global _collecting
        before, _collecting = _collecting, self
        try:
            yield
        finally:
            _collecting = before

    def add(self, weight: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        """Leave the gradient of a weight that ``compute`` gives."""
        self._left.append((weight, compute))

    def take(self) -> Callable[[], None]:
        """What computes all that is left by now, and adds it to the weights' ``.grad``."""
        left, self._left = self._left, deque()

        def compute_all() -> None:
            with torch.no_grad():
                while left:  # each lets go of its operands
                    weight, compute = left.popleft()
                    gradient = compute().to(weight.dtype)
                    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

        return compute_all


def is_collecting() -> bool:
    """Whether backward passes leave gradients of weights for later."""
    return _collecting is not None


def now_or_later(node: Any, compute: Callable[[], Tensor]) -> Tensor | None:
    """A weight's gradient; ``None`` if it is left for later.

    Args:
        node: of the graph, from the weight as the layer's function was given it; ``None`` without one.
        compute: what gives the gradient.
    """
    collecting = _collecting
    if collecting is None or torch.is_grad_enabled():
        return compute()
    weight = _parameter_behind(node)
    if weight is None:
        return compute()
    collecting.add(weight, compute)
    return None


def _parameter_behind(node: Any) -> nn.Parameter | None:
    """The weight's parameter, perhaps behind autocast's change of dtype, if nobody waits for its gradient."""
    if node is not None and node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    weight = getattr(node, "variable", None)
    if not isinstance(weight, nn.Parameter) or weight._backward_hooks:
        return None
    return None if weight._post_accumulate_grad_hooks else weight
