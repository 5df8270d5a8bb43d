"""The model's own loss call on logits that are cut over the vocabulary.

A model that is given labels computes its loss with ``F.cross_entropy``, somewhere between its last layer and
the end of its forward. Then the logits layer gives :class:`colrow.apply.loss_tensor.LocalLogits`, on which
that call is the parallel cross-entropy. As a rule the layer does not compute: the loss does, for some tokens
at a time (:mod:`colrow.apply.loss_late`). What the model returns has
:class:`colrow.apply.loss_output.ShardedLogits` in place of logits.

Without labels the logits are gathered, so that callers see what the original model gives.

Under torch.compile a forward without labels is traced like any other; with labels the graph breaks at these
hooks, and the loss itself is computed outside of graphs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from colrow.apply.loss_functions import answer
from colrow.apply.loss_late import late_logits
from colrow.apply.loss_output import ShardedLogits, without_local_logits
from colrow.apply.loss_tensor import LocalLogits, Vocabulary
from colrow.collectives import AllGather, Communicator
from colrow.errors import PlanError
from colrow.layers.linear import ColumnParallel
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
        may_be_late: whether the layer need not compute.
        vocabulary: of the logits that were given so far.
        records: whether it began with gradients recorded.
    """

    has_labels: bool
    backward: int
    may_be_late: bool = True
    vocabulary: Vocabulary | None = None
    records: bool = field(default_factory=torch.is_grad_enabled)


@dataclass(frozen=True)
class _Past:
    """How a forward went whose backward pass runs: what it recomputes, it recomputes as that computed it."""

    has_labels: bool = False
    may_be_late: bool = False


class ParallelLoss:
    """Hooks on the logits layer and on the module that computes the loss.

    They change neither the model nor any state of torch, so that a forward that is interrupted, by whatever,
    leaves nothing behind but the note that it ran, which the next one replaces.
    """

    def __init__(self, loss: Loss, communicator: Communicator, cut: Cut, gather: bool) -> None:
        self._loss, self._ranks, self._cut, self._gathers = loss, communicator, cut, gather
        self._forward: _Forward | None = None
        self._position = sys.maxsize  # of the labels among positional arguments
        self._past = _Past()  # of the forward whose backward pass runs
        # what gives logits before the loss gets them, with the number of hooks that are no one else's
        self._givers: list[tuple[nn.Module, int]] = []

    def attach(self, model: nn.Module, hooks: Callable[[str], int]) -> None:
        """Hook ``model``'s two modules.

        Args:
            hooks: how many forward hooks the module of a path has got by the plan so far.
        """
        # torch.compile would take their shape for the real one: what computes with them is left to Python
        torch._dynamo.config.nontraceable_tensor_subclasses.add(LocalLogits)
        module = model.get_submodule(self._loss.module)
        parameters = list(inspect.signature(module.forward).parameters)
        if self._loss.labels in parameters:
            self._position = parameters.index(self._loss.labels)
        module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        # before the hooks of others, which should see what the caller will
        module.register_forward_hook(self._end, always_call=True, prepend=True)
        layer = model.get_submodule(self._loss.logits)
        layer.register_forward_hook(self._after_logits)
        if self._loss.fused and isinstance(layer, ColumnParallel):
            layer.instead = self._instead
            self._givers = [(model.get_submodule(path), hooks(path)) for path in _givers(self._loss)]

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
        if isinstance(logits, LocalLogits):  # late
            return None
        forward = self._current()
        if forward.has_labels:
            return LocalLogits.of(logits, self._vocabulary(forward), logits.dim() - 1)
        return self._gather(logits) if self._gathers else None

    def _instead(self, layer: ColumnParallel, x: Tensor) -> Tensor | None:
        """What the logits layer gives instead of logits, if it need not compute them."""
        forward = self._current()
        if not forward.has_labels:
            return None
        if forward.records != torch.is_grad_enabled():
            # what runs without recording gets its place in the graph afterwards: reentrant checkpointing
            forward.may_be_late = False
        if (
            not forward.may_be_late
            or _is_special(layer)
            or any(_hooks_of(one) > own for one, own in self._givers)
        ):
            return None
        return late_logits(x, *layer.operands, layer.weights, self._vocabulary(forward), self._loss.logits)

    def _current(self) -> _Forward:
        """The forward within which the logits layer runs."""
        forward, backward = self._forward, torch._C._current_graph_task_id()
        if forward is not None and forward.backward == backward:
            return forward
        # not the model's forward: a part that activation checkpointing recomputes, or this layer alone
        past = self._past if backward != -1 else _Past()
        return _Forward(past.has_labels, backward, past.may_be_late)

    def _vocabulary(self, forward: _Forward) -> Vocabulary:
        if forward.vocabulary is None:
            forward.vocabulary = Vocabulary(self._ranks, self._cut, f"loss of {self._loss.logits}", answer)
        return forward.vocabulary

    def _gather(self, logits: Tensor) -> Tensor:
        label = f"gather {self._loss.logits}"
        return AllGather(self._ranks, label, logits.dim() - 1, self._cut.counts, "I")(logits)

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        forward = self._forward
        if torch.compiler.is_dynamo_compiling() and forward is not None and not forward.has_labels:
            self._forward, self._past = None, _Past()
            return None
        return self._end_eagerly(output)

    @_between_graphs
    def _end_eagerly(self, output: Any) -> Any:
        forward, self._forward = self._forward, None
        if forward is None or output is None:  # the forward raised
            return None
        if forward.vocabulary is not None and not forward.vocabulary.losses:
            raise PlanError(
                self._loss.module,
                "it was given labels but did not pass its logits to F.cross_entropy",
                "Compute the loss with colrow.cross_entropy, or leave the logits layer out of the plan.",
            )
        if forward.vocabulary is None and not torch.is_grad_enabled():
            return None
        past = None
        if torch.is_grad_enabled():
            self._past = past = _Past(forward.has_labels, forward.may_be_late)
        return without_local_logits(output, f"gather {self._loss.logits}", partial(self._notice, past))

    def _notice(self, past: _Past | None, tensor: Tensor) -> None:
        """A backward pass from ``tensor`` is that of a forward that went so."""
        if past is not None and tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(partial(self._backward_begins, past))

    def _backward_begins(self, past: _Past, gradients: object) -> None:
        self._past = past


def _givers(loss: Loss) -> list[str]:
    """What gives logits within the module that computes the loss: the layer, and the modules around it."""
    prefix = f"{loss.module}." if loss.module else ""
    names = loss.logits.removeprefix(prefix).split(".")
    return [prefix + ".".join(names[:count]) for count in range(1, len(names) + 1)]


def is_watched(model: nn.Module, loss: Loss) -> bool:
    """Whether somebody sees what the logits layer of a model gives, before there is a plan."""
    layer = model.get_submodule(loss.logits)
    return "forward" in vars(layer) or any(_hooks_of(model.get_submodule(path)) for path in _givers(loss))


def _hooks_of(module: nn.Module) -> int:
    """How many see what the module gives, or act when it has ended, as fully sharded weights do."""
    own = vars(module)
    return sum(len(own[name]) for name in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks"))


def _is_special(layer: ColumnParallel) -> bool:
    """Whether more happens in the layer than a product."""
    return (
        torch.nn.modules.module._has_any_global_hook()
        or "forward" in vars(layer)
        or layer.gather_output
        or layer.region is not None
    )
