"""Logits, their loss and its gradients for some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from colrow.layers.linear_functions import (
    ColumnWeights,
    add_gradient_of_weight,
    gradient_of_input,
    gradient_of_weight,
    product,
)
from colrow.layers.loss_terms import LossInputs, LossOptions, Reduction, Terms, wide_dtype

TOKENS_AT_LEAST = 256
"""Products of fewer rows are less efficient, and each chunk's gradient of the weight has to be added up."""
CHUNKS = 8
"""Into so many the tokens are divided, as far as each has :data:`TOKENS_AT_LEAST`."""


def tokens_per_chunk(tokens: int) -> int:
    """For how many tokens logits exist at once; the same on all ranks."""
    chunks = max(1, min(CHUNKS, tokens // TOKENS_AT_LEAST))
    return max(1, -(-tokens // chunks))


@dataclass(frozen=True)
class FusedLoss:
    """A loss that reduces all tokens to one number, of the logits of a layer.

    Attributes:
        layer: how the logits are computed.
        inputs: what else the loss is given.
        reduction: ``mean`` or ``sum``.
        change: applied to the logits, or ``None``.
    """

    layer: ColumnWeights
    inputs: LossInputs
    reduction: Reduction
    change: Callable[[Tensor], Tensor] | None

    @property
    def options(self) -> LossOptions:
        return self.inputs.options

    def reduced(self, losses: Tensor) -> Tensor:
        """The loss of all tokens, from that of each."""
        return losses.sum() if self.reduction == "sum" else losses.sum() / self.inputs.counted()

    def scale(self, dtype: torch.dtype) -> Tensor:
        """[tokens], the derivative of the loss with respect to each token's; 0 where that is ignored."""
        ones = self.inputs.kept.to(dtype)
        if self.reduction == "sum":
            return ones
        # where no token counts, the mean is not a number, and the gradient zero
        return torch.where(self.inputs.kept, ones / self.inputs.counted(), 0)


class Chunks:
    """One pass over the tokens. ``weight`` and ``x``, [tokens, features], in the dtype of the product."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, task: FusedLoss) -> None:
        self._x, self._weight, self._bias, self._task = x, weight, bias, task
        self._width = weight.shape[0 if task.layer.out_first else 1]
        step = tokens_per_chunk(len(x))
        self._parts = [slice(begin, begin + step) for begin in range(0, max(1, len(x)), step)]
        self._terms: Terms | None = None
        self._scale: Tensor | None = None

    def _logits(self, part: slice, follow: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits of some tokens in wide precision, in memory of their own.

        Args:
            follow: whether gradients will be wanted.

        Returns:
            The logits, and what makes their gradient that of the product.
        """
        layer, change = self._task.layer, self._task.change
        raw = product(self._x[part], self._weight, self._bias, layer.out_first, layer.products)
        dtype = raw.dtype
        if change is None:
            return raw.to(wide_dtype(dtype)), lambda gradient: gradient.to(dtype)
        with torch.set_grad_enabled(follow):
            logits = change(raw.requires_grad_(follow))
        # a copy: derivatives may be made of the result
        values = logits.detach().to(wide_dtype(logits.dtype), copy=True)
        return values, lambda gradient: torch.autograd.grad(logits, raw, gradient.to(logits.dtype))[0]

    def _of(self, values: Tensor) -> tuple[Terms, Tensor]:
        """What the loss of all tokens is made of, and what each token's is multiplied with."""
        if self._terms is None or self._scale is None:  # a change of the logits may change their dtype
            self._terms = Terms.of(self._task.inputs, self._width, values.dtype)
            self._scale = self._task.scale(values.dtype)
        return self._terms, self._scale

    def losses(self) -> Tensor:
        """[tokens], with two collectives."""
        options = self._task.options
        all_largest, all_sums = [], []
        for part in self._parts:
            values, _ = self._logits(part, False)
            terms = self._of(values)[0]
            linear = terms.at(part).of_logits(values)
            largest = _largest(values)
            all_largest.append(largest)
            sum = values.sub_(_finite(largest)[:, None]).exp_().sum(1)
            all_sums.append(torch.stack([sum, *linear]))
        own, sums = torch.cat(all_largest), torch.cat(all_sums, 1)
        largest = options.ranks.all_reduce(own, "max", label=f"{options.label} max")
        sums[0] *= (_finite(own) - largest).exp()
        sums = options.ranks.start_all_reduce(sums, label=f"{options.label} sum", owned=True).wait()
        return terms.loss(sums[0].log() + largest, sums[1:])

    def losses_and_gradients(self, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, list[Tensor | None]]:
        """[tokens], and the gradients of hidden states (a partial sum), weight and bias, where wanted."""
        gradients = _Gradients(self._x, self._weight, self._bias, self._task.layer, len(self._parts), wanted)
        losses = []
        for part in self._parts:
            loss, gradient = self._step(part)
            losses.append(loss)
            gradients.add(part, gradient)
            del gradient  # before there are other logits
        return torch.cat(losses), gradients.finish()

    def _step(self, part: slice) -> tuple[Tensor, Tensor]:
        """Of some tokens the losses, and the gradient of what the product gives."""
        options = self._task.options
        values, pull_back = self._logits(part, True)
        terms, scale = self._of(values)
        terms, scale = terms.at(part), scale[part]
        own = _largest(values)
        largest = options.ranks.start_all_reduce(own, "max", label=f"{options.label} max", owned=True).wait()
        linear = terms.of_logits(values)
        values.sub_(largest.unsqueeze(1)).exp_()
        sums = torch.stack([values.sum(1), *linear])
        sums = options.ranks.start_all_reduce(sums, label=f"{options.label} sum", owned=True).wait()
        log_sum = sums[0].log() + largest
        values.mul_((terms.of_softmax(log_sum, scale) / sums[0]).unsqueeze(1))
        terms.finish_gradient_(values, scale)
        return terms.loss(log_sum, sums[1:]), pull_back(values)


def _largest(values: Tensor) -> Tensor:
    return values.amax(1) if values.shape[1] else values.new_full((len(values),), -torch.inf)


def _finite(largest: Tensor) -> Tensor:
    """With which exponentials of logits that are all minus infinity are zero."""
    return largest.clamp(min=torch.finfo(largest.dtype).min)


class _Gradients:
    """Sums of what each chunk adds to the gradients. In single precision at least, if there are several."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: ColumnWeights,
        chunks: int,
        wanted: tuple[bool, bool, bool],
    ) -> None:
        self._x, self._weight, self._layer = x, weight, layer
        self._is_summed = chunks > 1
        self._wanted = wanted
        self._of_x = torch.empty_like(x) if wanted[0] and self._is_summed else None
        self._of_weight: Tensor | None = None
        self._of_bias: Tensor | None = None
        self._bias_dtype = None if bias is None else bias.dtype

    def add(self, part: slice, gradient: Tensor) -> None:
        """Add what follows from the gradient of the logits of some tokens."""
        x, weight, layer = self._x[part], self._weight, self._layer
        if self._wanted[0]:
            of_x = gradient_of_input(gradient, weight, layer.out_first, layer.products)
            if self._of_x is None:
                self._of_x = of_x
            else:
                self._of_x[part] = of_x
        if self._wanted[1]:
            if not self._is_summed:
                self._of_weight = gradient_of_weight(gradient, x, weight, layer.out_first, layer.products)
            else:
                is_first = self._of_weight is None
                if self._of_weight is None:
                    self._of_weight = torch.empty_like(weight, dtype=wide_dtype(gradient.dtype))
                add_gradient_of_weight(
                    self._of_weight, gradient, x, weight, layer.out_first, layer.products, is_first
                )
        if self._wanted[2]:
            of_bias = gradient.sum(0, dtype=wide_dtype(gradient.dtype))
            self._of_bias = of_bias if self._of_bias is None else self._of_bias.add_(of_bias)

    def finish(self) -> list[Tensor | None]:
        """Those of hidden states, weight and bias, in the dtypes of these."""
        of_weight, of_bias = self._of_weight, self._of_bias
        return [
            self._of_x,
            None if of_weight is None else of_weight.to(self._weight.dtype),
            None if of_bias is None else of_bias.to(self._bias_dtype),
        ]
