"""What is called in place of attention and of losses where ranks have some tokens each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from inspect import Signature, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.collectives import AllReduce
from colrow.errors import PlanError
from colrow.parallel.context.attention import context_attention
from colrow.parallel.context.plan import At, Extent, LossCall
from colrow.parallel.context.running import Repeated, Running


class AttentionOverRanks:
    """``F.scaled_dot_product_attention`` of a rank's queries over all ranks' keys and values.

    Args:
        running: knows which tokens the rank has.
        at: the call, for errors and statistics.
    """

    def __init__(self, running: Running, at: At) -> None:
        self._running, self._at = running, at

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The attention.

        Raises:
            PlanError: if there is a mask.
        """
        running = self._running
        if attn_mask is not None:
            raise PlanError(
                self._at.module,
                f"attention is given a mask ({self._at.call}), which it was not in the examples; sequences "
                "are cut over ranks (cp)",
                "Leave padding out: pack sequences, or mark padded labels as ignored and give no mask.",
            )
        running.counts[0] += 1
        return context_attention(
            query,
            key,
            value,
            running.ranks,
            running.share,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            dropout_p=dropout_p,
            method=running.method,
            label=f"attention {self._at.module}",
        )


class LossOverRanks:
    """``F.cross_entropy`` or ``F.nll_loss``: the mean, or sum, over all ranks' tokens.

    It is the same on all ranks. Its gradient is so that the mean over the ranks of each parameter's gradients
    is that of the whole: a rank finds what comes from its own tokens, as many times as there are ranks.

    Args:
        running: knows which tokens the rank has.
        loss: the call.
    """

    def __init__(self, running: Running, loss: LossCall) -> None:
        self._running, self._loss = running, loss

    @cached_property
    def _function(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(F, self._loss.at.call.function)
        return function

    @cached_property
    def _signature(self) -> Signature:
        return signature(self._function)

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        """The loss."""
        bound = self._signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        given = bound.arguments
        running, target, reduction = self._running, given["target"], given["reduction"]
        if reduction not in ("mean", "sum"):
            raise PlanError(
                self._loss.at.module,
                f"the loss is taken with reduction={reduction!r} ({self._loss.at.call}), which it was not in "
                "the examples; sequences are cut over ranks (cp)",
                "Give an example of each way in which the model is called.",
            )
        running.counts[1] += 1
        where = self._loss.target
        if where is not None:
            target = running.take(_filled(target, where, running.share.length, given["ignore_index"]), where)
        label = f"loss of {self._loss.at.module or 'the model'}"
        given["target"], given["reduction"] = target, "sum"
        own = self._function(*bound.args, **bound.kwargs)
        total = AllReduce(running.ranks, label, "I")(Repeated.apply(own, running.ranks.size))
        if reduction == "sum":
            return total
        kept = target != given["ignore_index"]
        weight = given["weight"]
        # exact however many tokens there are
        counted = (
            kept.sum() if weight is None else weight[torch.where(kept, target, 0)].double().mul(kept).sum()
        )
        counted = running.ranks.all_reduce(counted, label=f"{label} tokens")
        return total / counted.to(total.dtype)


def _filled(target: Tensor, where: Extent, length: int, ignored: int) -> Tensor:
    """Targets with one for each token of a sequence of ``length``; those that are missing are ignored."""
    if not where.missing:
        return target
    there = length - where.missing
    dimension = where.dimension
    if target.shape[dimension] % max(1, there * where.inner):
        raise ValueError(
            f"targets of shape {list(target.shape)} have not {there} tokens in dimension {dimension}: call "
            "the model as in the examples that it was parallelized with"
        )
    rows = target.unflatten(dimension, (-1, there, where.inner))
    shape = list(rows.shape)
    shape[dimension + 1] = where.missing
    return torch.cat([rows, rows.new_full(shape, ignored)], dimension + 1).flatten(dimension, dimension + 2)
