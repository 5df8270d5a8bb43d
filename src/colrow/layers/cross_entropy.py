"""Cross-entropy of logits whose vocabulary is cut over the ranks, without gathering them.

Shoeybi et al. 2019 (Megatron-LM, section 3): what crosses the ranks is a few numbers per token, first the
largest logit, then the sum of exponentials and the target's logit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colrow.collectives import AllReduce, Group, communicator, compiled
from colrow.layers.loss_terms import (
    NO_SECOND_DERIVATIVE,
    LossInputs,
    Reduction,
    Terms,
    checked,
    wide_dtype,
)
from colrow.layout import Cut

TOKENS_PER_CHUNK = 1024
"""Logits are widened to single precision for this many tokens at a time."""


def _wide(chunk: Tensor) -> Tensor:
    return chunk if chunk.dtype == torch.float64 else chunk.float()


class _CrossEntropy(torch.autograd.Function):
    """Loss per token, I, from logits [tokens, this rank's ids], V; 0 where the target is ignored."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: LossInputs) -> Tensor:
        tokens, width = logits.shape
        options, wide = inputs.options, wide_dtype(logits.dtype)
        terms = Terms.of(inputs, width, wide)

        largest = logits.new_full((tokens,), -torch.inf, dtype=wide)
        if width:
            torch.amax(logits, 1, out=largest) if logits.dtype == wide else largest.copy_(logits.amax(1))
        largest = options.ranks.all_reduce(largest, "max", label=f"{options.label} max")

        # rows: sum of exponentials; then what is linear in the logits
        sums = logits.new_zeros((3 if options.smoothing else 2, tokens), dtype=wide)
        for begin in range(0, tokens, TOKENS_PER_CHUNK) if width else ():
            part = slice(begin, begin + TOKENS_PER_CHUNK)
            values = _wide(logits[part])
            sums[0, part] = (values - largest[part, None]).exp_().sum(1)
            for row, sum in enumerate(terms.at(part).of_logits(values), 1):
                sums[row, part] = sum
        sums = options.ranks.start_all_reduce(sums, label=f"{options.label} sum", owned=True).wait()

        log_sum = sums[0].log() + largest
        ctx.save_for_backward(logits, log_sum)
        ctx.terms = terms
        return terms.loss(log_sum, sums[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        logits, log_sum = ctx.saved_tensors
        terms: Terms = ctx.terms
        tokens, width = logits.shape
        result = torch.empty_like(logits)
        scale = torch.where(terms.kept, gradient, 0)
        of_softmax = terms.of_softmax(log_sum, scale)
        for begin in range(0, tokens, TOKENS_PER_CHUNK) if width else ():
            part = slice(begin, begin + TOKENS_PER_CHUNK)
            values = (_wide(logits[part]) - log_sum[part, None]).exp_().mul_(of_softmax[part, None])
            terms.at(part).finish_gradient_(values, scale[part])
            result[part] = values
        return result, None


def _traced(logits: Tensor, inputs: LossInputs) -> Tensor:
    """:class:`_CrossEntropy` in operators that torch.compile can trace: it fuses them and keeps no copy."""
    options, target, kept, weight = inputs.options, inputs.target, inputs.kept, inputs.class_weight
    tokens, width = logits.shape
    local = target - options.start
    own = kept & (local >= 0) & (local < width)
    # an ignored token's logits may be infinite: its gradient is zero all the same
    values = torch.where(kept[:, None], _wide(logits), 0)
    wide = values.dtype
    largest = values.new_full((tokens,), -torch.inf)
    if width:
        largest = values.detach().amax(1)
    largest = compiled.all_reduce(options.ranks, largest, "max")
    sums = [(values - largest[:, None]).exp().sum(1)]
    if width:
        chosen = values.gather(1, torch.where(own, local, 0)[:, None])[:, 0]
        sums.append(torch.where(own, chosen, 0))
    else:
        sums.append(values.sum(1))
    total_weight: float | Tensor = float(options.vocabulary)
    target_weight = kept.to(wide)
    if weight is not None:
        total_weight = weight.to(wide).sum()
        target_weight = target_weight * weight.to(wide)[torch.where(kept, target, 0)]
    if options.smoothing:
        sums.append(values.sum(1) if weight is None else values @ options.own(weight, width).to(wide))
    reduced = AllReduce(options.ranks, f"{options.label} sum")(torch.stack(sums))
    log_sum = reduced[0].log() + largest
    loss = (1 - options.smoothing) * target_weight * (log_sum - reduced[1])
    if options.smoothing:
        loss = loss + options.smoothing / options.vocabulary * (log_sum * total_weight - reduced[2])
    if options.z_loss:
        loss = loss + options.z_loss * log_sum**2
    return torch.where(kept, loss, 0)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Group,
    *,
    vocabulary: int | Cut,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    label: str = "cross-entropy",
) -> Tensor:
    """``F.cross_entropy`` of logits cut along the vocabulary; the logits are never gathered.

    Two all-reduces forward, of one and of two (with label smoothing three) numbers per token; none backward.
    Neither ``logits`` nor the incoming gradient is written to. Half-precision logits are widened to single
    precision a thousand tokens at a time. Second derivatives raise an error.

    Args:
        logits: [..., this rank's ids], V: any floating dtype.
        target: [...], integers, equal on all ranks: global ids, or ``ignore_index``.
        group: process group, mesh or communicator.
        vocabulary: number of ids over all ranks (cut evenly), or the cut itself.
        weight: [vocabulary], weights of the classes, whole on every rank; gets no gradient.
        ignore_index: target value that contributes neither loss nor gradient nor weight.
        reduction: ``mean`` (over the weights of the targets that count), ``sum`` or ``none``.
        label_smoothing: probability in [0, 1) that is spread evenly over all ids.
        z_loss: coefficient of the squared log-partition (Chowdhery et al. 2022, PaLM, section 5), which
            keeps logits from drifting; averaged like the rest, unweighted.
        label: names the collectives in errors and statistics.

    Returns:
        The loss, I: a scalar, or [...] for ``none``; single precision at least.

    Raises:
        IndexError: if a target is neither in [0, vocabulary) nor ``ignore_index``.
        ValueError: if shapes, cut and group do not fit, or an option is out of range.
    """
    inputs = checked(
        communicator(group),
        vocabulary,
        logits.shape[-1],
        logits.shape[:-1],
        target,
        weight,
        reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        label=label,
    )
    function = _traced if torch.compiler.is_compiling() else _CrossEntropy.apply
    loss: Tensor = function(logits.reshape(target.numel(), logits.shape[-1]), inputs)
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / inputs.counted()
