"""The mean over replicas of experts' gradients, beside a wrapper that averages those of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from colrow.collectives import Communicator
from colrow.collectives.statistics import GRADIENTS_OF_REPLICAS


class ExpertGradients:
    """Averages the gradients of experts over their replicas whenever ``DistributedDataParallel`` averages.

    Gradients add up in ``.grad`` and are averaged in place at the end of the backward pass, each by a
    collective of its own: stacked experts are large.

    Args:
        wrapper: that leaves these parameters alone.
        parameters: of experts, in an order that is the same on all ranks, with their names.
        ranks: that hold the same experts.
    """

    def __init__(
        self,
        wrapper: DistributedDataParallel,
        parameters: Sequence[tuple[str, nn.Parameter]],
        ranks: Communicator,
    ) -> None:
        self._ranks, self._parameters = ranks, tuple(parameters)
        self._pending: set[int] = set()
        self._averages = True
        if ranks.size == 1:
            return
        wrapper.register_forward_pre_hook(self._begin)
        for _, parameter in self._parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _begin(self, wrapper: nn.Module, arguments: Any) -> None:
        # the wrapper decides by the forward pass, too
        self._averages = bool(wrapper.require_backward_grad_sync)
        self._pending.clear()  # of a backward pass that raised

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if not self._averages:
            return
        if not self._pending:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._average)
        self._pending.add(id(parameter))

    def _average(self) -> None:
        found = [
            (name, one.grad)
            for name, one in self._parameters
            if id(one) in self._pending and one.grad is not None
        ]
        self._pending.clear()
        with torch.no_grad():
            begun = [
                (
                    gradient,
                    self._ranks.start_all_reduce(
                        gradient, label=f"{GRADIENTS_OF_REPLICAS}: {name}", owned=True
                    ),
                )
                for name, gradient in found
            ]
            for gradient, pending in begun:
                total = pending.wait()
                if total is not gradient:
                    gradient.copy_(total)
                gradient.div_(self._ranks.size)
