"""Cross-entropy of logits whose vocabulary is cut over the ranks, without gathering them.

Shoeybi et al. 2019 (Megatron-LM, section 3): what crosses the ranks is a few numbers per token, first the
largest logit, then the sum of exponentials and the target's logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from colrow.collectives import AllReduce, Communicator, Group, communicator, compiled
from colrow.layers.embedding import check_range
from colrow.layout import Cut

TOKENS_PER_CHUNK = 1024
"""Logits are widened to single precision for this many tokens at a time."""


@dataclass(frozen=True)
class _Options:
    ranks: Communicator
    start: int
    vocabulary: int
    ignore_index: int
    smoothing: float
    z_loss: float
    label: str


def _wide(chunk: Tensor) -> Tensor:
    return chunk if chunk.dtype == torch.float64 else chunk.float()


class _CrossEntropy(torch.autograd.Function):
    """Loss per token, I, from logits [tokens, this rank's ids], V; 0 where the target is ignored."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, options: _Options) -> Tensor:
        tokens, width = logits.shape
        kept = target != options.ignore_index
        local = target - options.start
        own = kept & (local >= 0) & (local < width)
        column = torch.where(own, local, 0)
        chunks = range(0, tokens, TOKENS_PER_CHUNK)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32

        largest = logits.new_full((tokens,), -torch.inf, dtype=wide)
        if width:
            torch.amax(logits, 1, out=largest) if logits.dtype == wide else largest.copy_(logits.amax(1))
        largest = options.ranks.all_reduce(largest, "max", label=f"{options.label} max")

        # rows: sum of exponentials; the target's logit; (weighted) sum of logits, for label smoothing
        sums = logits.new_zeros((3 if options.smoothing else 2, tokens), dtype=wide)
        for begin in chunks if width else ():
            part = slice(begin, begin + TOKENS_PER_CHUNK)
            values = _wide(logits[part])
            sums[0, part] = (values - largest[part, None]).exp_().sum(1)
            sums[1, part] = torch.where(own[part], values.gather(1, column[part, None])[:, 0], 0)
            if options.smoothing:
                local_weight = None if weight is None else _local(weight, options, width).to(wide)
                sums[2, part] = values.sum(1) if local_weight is None else values @ local_weight
        sums = options.ranks.start_all_reduce(sums, label=f"{options.label} sum", owned=True).wait()

        log_sum = sums[0].log() + largest
        target_weight = kept.to(wide)
        total_weight = float(options.vocabulary)
        if weight is not None:
            target_weight = target_weight * weight.to(wide)[torch.where(kept, target, 0)]
            total_weight = float(weight.sum())
        loss = (1 - options.smoothing) * target_weight * (log_sum - sums[1])
        if options.smoothing:
            share = options.smoothing / options.vocabulary
            loss = loss + share * torch.where(kept, log_sum * total_weight - sums[2], 0)
        if options.z_loss:
            loss = loss + options.z_loss * torch.where(kept, log_sum**2, 0)
        # a number that is not finite must not hide behind an ignored target
        loss = torch.where(kept, loss, 0)
        ctx.save_for_backward(logits, log_sum, kept, own, column, target_weight, weight)
        ctx.options, ctx.total_weight = options, total_weight
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the parallel cross-entropy has no second derivative: call backward without create_graph, "
                "or gather the logits and use F.cross_entropy"
            )
        logits, log_sum, kept, own, column, target_weight, weight = ctx.saved_tensors
        options: _Options = ctx.options
        tokens, width = logits.shape
        result = torch.empty_like(logits)
        if not width:
            return result, None, None, None
        scale = torch.where(kept, gradient, 0)
        share = options.smoothing / options.vocabulary
        # coefficient of the softmax, and of the target's own logit
        of_target = scale * (1 - options.smoothing) * target_weight
        of_softmax = of_target + scale * share * ctx.total_weight
        if options.z_loss:
            of_softmax = of_softmax + 2 * options.z_loss * scale * log_sum
        of_every = None
        if options.smoothing:
            ones = torch.ones(width, dtype=log_sum.dtype, device=logits.device)
            of_every = share * (ones if weight is None else _local(weight, options, width).to(log_sum.dtype))
        for begin in range(0, tokens, TOKENS_PER_CHUNK):
            part = slice(begin, begin + TOKENS_PER_CHUNK)
            values = (_wide(logits[part]) - log_sum[part, None]).exp_().mul_(of_softmax[part, None])
            correction = torch.where(own[part], of_target[part], 0)
            values.scatter_add_(1, column[part, None], -correction[:, None])
            if of_every is not None:
                values.sub_(scale[part, None] * of_every)
            # an ignored token's logits may be infinite: its gradient is zero all the same
            values.masked_fill_(~kept[part, None], 0)
            result[part] = values
        return result, None, None, None


def _traced(logits: Tensor, target: Tensor, weight: Tensor | None, options: _Options) -> Tensor:
    """:class:`_CrossEntropy` in operators that torch.compile can trace: it fuses them and keeps no copy."""
    tokens, width = logits.shape
    kept = target != options.ignore_index
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
        sums.append(values.sum(1) if weight is None else values @ _local(weight, options, width).to(wide))
    reduced = AllReduce(options.ranks, f"{options.label} sum")(torch.stack(sums))
    log_sum = reduced[0].log() + largest
    loss = (1 - options.smoothing) * target_weight * (log_sum - reduced[1])
    if options.smoothing:
        loss = loss + options.smoothing / options.vocabulary * (log_sum * total_weight - reduced[2])
    if options.z_loss:
        loss = loss + options.z_loss * log_sum**2
    return torch.where(kept, loss, 0)


def _local(weight: Tensor, options: _Options, width: int) -> Tensor:
    return weight[options.start : options.start + width]


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Group,
    *,
    vocabulary: int | Cut,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
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
    ranks = communicator(group)
    cut = vocabulary if isinstance(vocabulary, Cut) else Cut.balanced(vocabulary, ranks.size)
    if cut.ranks != ranks.size or cut.count(ranks.rank) != logits.shape[-1]:
        raise ValueError(
            f"rank {ranks.rank} should hold the logits of {cut.counts[ranks.rank]} of {cut.units} ids, "
            f"got {logits.shape[-1]}"
        )
    if logits.shape[:-1] != target.shape:
        raise ValueError(f"logits {list(logits.shape)} do not fit the target {list(target.shape)}")
    if target.is_floating_point():
        raise ValueError("class probabilities as target are not supported: give ids")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if weight is not None and tuple(weight.shape) != (cut.units,):
        raise ValueError(f"weight must have the shape [{cut.units}], not {list(weight.shape)}")
    flat_target = target.reshape(-1)
    kept = flat_target != ignore_index
    check_range(torch.where(kept, flat_target, 0), cut.units, f"the targets of {label}")
    options = _Options(ranks, cut.start(ranks.rank), cut.units, ignore_index, label_smoothing, z_loss, label)
    loss: Tensor = (_traced if torch.compiler.is_compiling() else _CrossEntropy.apply)(
        logits.reshape(target.numel(), logits.shape[-1]),
        flat_target,
        None if weight is None else weight.detach(),
        options,
    )
    if reduction == "none":
        return loss.view(target.shape)
    if reduction == "sum":
        return loss.sum()
    counted = kept if weight is None else weight[torch.where(kept, flat_target, 0)] * kept
    return loss.sum() / counted.sum()
