"""The last linear layer and its cross-entropy at once, so that logits never exist for all tokens.

A language model's largest activations are its logits, with their gradient and, in half precision, their copy
in single precision. Here they are computed for some tokens at a time: the logits, the loss, the gradient of
the logits, and what it adds to the gradients of the hidden states and of the weight, all in the forward pass
(Hsu et al. 2024, Liger Kernel, section 3.2). The backward pass multiplies these with the number that comes
in. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from colrow.collectives import Group, communicator
from colrow.layers.cross_entropy import cross_entropy
from colrow.layers.linear_functions import ColumnWeights, as_rows, autocast, column_linear
from colrow.layers.loss_chunks import Chunks, FusedLoss
from colrow.layers.loss_terms import NO_SECOND_DERIVATIVE, Reduction, checked
from colrow.layers.products import Products
from colrow.layout import Cut

_BY_TORCH = Products()


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss, I, from hidden states [tokens, features], I or R, with the gradients computed at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, task: FusedLoss) -> Tensor:
        with _as_given(x):
            chunks = Chunks(x, weight, bias, task)
            losses, gradients = chunks.losses_and_gradients(ctx.needs_input_grad[:3])
            ctx.save_for_backward(*gradients)
            ctx.layer = task.layer
            return task.reduced(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        layer: ColumnWeights = ctx.layer
        saved = list(ctx.saved_tensors)
        if _is_kept():
            saved = [None if one is None else one * gradient for one in saved]
        elif gradient.device.type != "cpu" or float(gradient) != 1:
            for one in saved:
                if one is not None:
                    one.mul_(gradient)
        of_x, of_weight, of_bias = saved
        if of_x is not None and not layer.is_entered:
            of_x = layer.ranks.start_all_reduce(of_x, label=layer.label, owned=True).wait()
        return of_x, of_weight, of_bias, None


def _is_kept() -> bool:
    """Whether this backward pass is done with ``retain_graph=True``, so that there may be another."""
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


def _as_given(x: Tensor) -> AbstractContextManager[object]:
    """The operands have been cast already: what is in single precision stays so."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    group: Group,
    *,
    vocabulary: int | Cut,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    change: Callable[[Tensor], Tensor] | None = None,
    reads: Literal["I", "R"] = "I",
    label: str = "linear cross-entropy",
) -> Tensor:
    """:func:`colrow.cross_entropy` of ``F.linear(x, weight, bias)``, whose logits never exist for all tokens.

    Where gradients are wanted they are computed with the loss, for an eighth of the tokens at a time (256 at
    least), with two all-reduces each, of one and of two (with label smoothing three) numbers per token.
    Without gradients there are two in all. ``x``'s gradient is reduced backward, if ``reads`` is ``"I"``.
    Gradients of half-precision weights are added up in single precision. Second derivatives raise an error.

    ``reduction="none"``, float16 (whose small gradients would vanish) and torch.compile compute all logits.

    Args:
        x: [..., features], hidden states, whole on every rank.
        weight: [this rank's ids, features].
        bias: [this rank's ids], or ``None``.
        target: [...], integers, equal on all ranks: global ids, or ``ignore_index``.
        group: process group, mesh or communicator.
        vocabulary: number of ids over all ranks (cut evenly), or the cut itself.
        class_weight: [vocabulary], weights of the classes, whole on every rank; gets no gradient.
        ignore_index, reduction, label_smoothing, z_loss: as in :func:`colrow.cross_entropy`.
        change: applied to the logits of some tokens at a time, such as ``lambda x: 30 * torch.tanh(x / 30)``;
            acts on each logit by itself, and no parameter in it gets a gradient.
        reads: ``"I"``: the gradient of ``x`` is reduced here; ``"R"``: the caller has entered ``x``.
        label: names the collectives in errors and statistics.

    Returns:
        The loss, I: a scalar, or [...] for ``none``; single precision at least.

    Raises:
        IndexError: if a target is neither in [0, vocabulary) nor ``ignore_index``.
        ValueError: if shapes, cut and group do not fit, or an option is out of range.
    """
    layer = ColumnWeights(communicator(group), f"enter {label}", True, _BY_TORCH, reads == "R")
    return column_cross_entropy(
        x,
        weight,
        bias,
        target,
        layer,
        vocabulary=vocabulary,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        change=change,
        label=label,
    )


def column_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    layer: ColumnWeights,
    *,
    vocabulary: int | Cut,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    change: Callable[[Tensor], Tensor] | None = None,
    label: str = "linear cross-entropy",
) -> Tensor:
    """:func:`linear_cross_entropy` for a layer of any kind."""
    operands = autocast(x, weight, bias)
    x, weight, bias = operands[0], operands[1], operands[2]  # type: ignore[assignment]
    if reduction == "none" or not _can_be_fused(x):
        logits = column_linear(
            x, weight, bias, layer.ranks, layer.label, layer.out_first, layer.products, layer.is_entered
        )
        return cross_entropy(
            logits if change is None else change(logits),
            target,
            layer.ranks,
            vocabulary=vocabulary,
            weight=class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            label=label,
        )
    width = weight.shape[0 if layer.out_first else 1]
    inputs = checked(
        layer.ranks,
        vocabulary,
        width,
        x.shape[:-1],
        target,
        class_weight,
        reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        label=label,
    )
    task = FusedLoss(layer, inputs, reduction, change)
    rows = as_rows(x)
    wants_gradient = any(one is not None and one.requires_grad for one in (x, weight, bias))
    if torch.is_grad_enabled() and wants_gradient:
        loss: Tensor = _LinearCrossEntropy.apply(rows, weight, bias, task)
        return loss
    with torch.no_grad(), _as_given(x):
        return task.reduced(Chunks(rows, weight, bias, task).losses())


def _can_be_fused(x: Tensor) -> bool:
    """Small gradients of half precision would vanish before the loss's own scale is multiplied in."""
    return not (torch.compiler.is_compiling() or x.is_meta or x.dtype == torch.float16)
