"""The model's own loss call on logits that are cut over the vocabulary.

A model that is given labels computes its loss with ``F.cross_entropy``, somewhere between its last layer and
the end of its forward. Then the logits layer gives :class:`colrow.apply.loss_logits.LocalLogits`, on which
that call is the parallel cross-entropy. What the model returns has
:class:`colrow.apply.loss_output.ShardedLogits` in their place.

Without labels the logits are gathered, so that callers see what the original model gives.

Under torch.compile a forward without labels is traced like any other; with labels the graph breaks at these
hooks, and the loss itself is computed outside of graphs.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from colrow.apply.loss_logits import LocalLogits, Vocabulary
from colrow.apply.loss_output import ShardedLogits, without_local_logits
from colrow.collectives import AllGather, Communicator
from colrow.errors import PlanError
from colrow.layout import Cut
from colrow.plan import Loss
from colrow.tracer import outside_of_graphs

__all__ = ["ParallelLoss", "ShardedLogits"]


_between_graphs = outside_of_graphs(
    "the loss of logits that are cut over the vocabulary is not part of compiled graphs: give no labels and "
    "use colrow.cross_entropy, or compile without fullgraph=True"
)


@dataclass
class _Forward:
    """A forward of the module that computes the loss.

    Attributes:
        has_labels: whether it was given labels.
        backward: the backward pass within which it runs (a recomputation), or -1.
        vocabulary: of the logits that were computed so far.
    """

    has_labels: bool
    backward: int
    vocabulary: Vocabulary | None = None


class ParallelLoss:
    """Hooks on the logits layer and on the module that computes the loss.

    They change neither the model nor any state of torch, so that a forward that is interrupted, by whatever,
    leaves nothing behind but the note that it ran, which the next one replaces.
    """

    def __init__(self, loss: Loss, communicator: Communicator, cut: Cut, gather: bool) -> None:
        self._loss, self._ranks, self._cut, self._gathers = loss, communicator, cut, gather
        self._forward: _Forward | None = None
        self._position = sys.maxsize  # of the labels among positional arguments
        # whether the forward had labels whose backward pass runs: asked by what it recomputes
        self._recomputes_with_labels = False

    def attach(self, model: nn.Module) -> None:
        """Hook ``model``'s two modules."""
        # torch.compile would take their shape for the real one: what computes with them is left to Python
        torch._dynamo.config.nontraceable_tensor_subclasses.add(LocalLogits)
        module = model.get_submodule(self._loss.module)
        parameters = list(inspect.signature(module.forward).parameters)
        if self._loss.labels in parameters:
            self._position = parameters.index(self._loss.labels)
        module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        # before the hooks of others, which should see what the caller will
        module.register_forward_hook(self._end, always_call=True, prepend=True)
        model.get_submodule(self._loss.logits).register_forward_hook(self._after_logits)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get(self._loss.labels)
        if labels is None and self._position < len(args):
            labels = args[self._position]
        if labels is None and torch.compiler.is_dynamo_compiling():
            self._forward = _Forward(False, -1)
        else:
            self._begin_eagerly(labels is not None)

    @_between_graphs
    def _begin_eagerly(self, has_labels: bool) -> None:
        self._forward = _Forward(has_labels, torch._C._current_graph_task_id())

    def _after_logits(self, module: nn.Module, args: Any, logits: Tensor) -> Tensor | None:
        forward = self._forward
        if torch.compiler.is_dynamo_compiling() and forward is not None and not forward.has_labels:
            return self._gather(logits) if self._gathers else None
        return self._after_logits_eagerly(logits)

    @_between_graphs
    def _after_logits_eagerly(self, logits: Tensor) -> Tensor | None:
        forward = self._forward
        backward = torch._C._current_graph_task_id()
        if forward is None or forward.backward != backward:
            # not the model's forward: a part that activation checkpointing recomputes, or this layer alone
            forward = _Forward(backward != -1 and self._recomputes_with_labels, backward)
        if forward.has_labels:
            if forward.vocabulary is None:
                forward.vocabulary = Vocabulary(self._ranks, self._cut, f"loss of {self._loss.logits}")
            return LocalLogits.of(logits, forward.vocabulary, logits.dim() - 1)
        return self._gather(logits) if self._gathers else None

    def _gather(self, logits: Tensor) -> Tensor:
        label = f"gather {self._loss.logits}"
        return AllGather(self._ranks, label, logits.dim() - 1, self._cut.counts, "I")(logits)

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        forward = self._forward
        if torch.compiler.is_dynamo_compiling() and forward is not None and not forward.has_labels:
            self._forward, self._recomputes_with_labels = None, False
            return None
        return self._end_eagerly(output)

    @_between_graphs
    def _end_eagerly(self, output: Any) -> Any:
        forward, self._forward = self._forward, None
        if forward is None or output is None:  # the forward raised
            return None
        if forward.vocabulary is not None and not forward.vocabulary.computed:
            raise PlanError(
                self._loss.module,
                "it was given labels but did not pass its logits to F.cross_entropy",
                "Compute the loss with colrow.cross_entropy, or leave the logits layer out of the plan.",
            )
        if forward.vocabulary is None and not torch.is_grad_enabled():
            return None
        output, tensors = without_local_logits(output, f"gather {self._loss.logits}")
        if torch.is_grad_enabled():
            # what this forward's backward pass recomputes, it recomputes as this forward computed it
            self._recomputes_with_labels = forward.has_labels
            for tensor in tensors:
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(partial(self._backward_begins, forward.has_labels))
        return output

    def _backward_begins(self, has_labels: bool, gradients: object) -> None:
        self._recomputes_with_labels = has_labels
