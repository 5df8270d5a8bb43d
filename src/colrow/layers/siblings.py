"""Column-parallel linear layers that read one value, q, k and v or gate and up, as one node of the graph.

Its backward adds up the gradients of the value in one piece of memory, begins their reduction, computes the
gradients of all weights meanwhile, and then waits. Forward the layers stay what they are: each computes its
own product when it is called, with the bits that it would have alone. (One product with all weights side by
side was measured too: forward and backward it is as fast as several to within a few percent, on one core
with 64 and 1024 tokens and 512 and 2048 features, and costs copies of what it gives.)

Of a value that was gathered from the parts of a sequence the rank keeps its own, and gathers again while the
value's gradient is computed (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models", section 4.2.2).

The node is made when the first of the layers is called, and with it the results of all: memory that nothing
has been written to. Each layer puts its product there. A layer that is not called has cost nothing, and no
gradient comes from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from colrow.layers.inputs import Input
from colrow.layers.later import now_or_later
from colrow.layers.linear_functions import (
    add_gradient_of_input,
    as_rows,
    entered,
    gradient_of_input,
    gradient_of_weight,
    product,
)
from colrow.layers.products import BY_TORCH, Products


class Linear(Protocol):
    """A linear layer, as far as its product goes."""

    products: Products
    instead: Any
    _out_first: bool
    _parameters: dict[str, nn.Parameter | None]
    _forward_pre_hooks: dict[int, Any]


class Siblings:
    """What several layers make of one value.

    Args:
        x: the value: [..., in].
        kept: what it came from and autograd keeps, whose gradient is wanted; ``x`` itself if it is I.
        layers: all that may read it.
        weights, biases: theirs.
        given: how the value comes from what is kept.
    """

    __slots__ = ("_hooks", "_layers", "_read", "_results", "_x")

    def __init__(
        self,
        x: Tensor,
        kept: Tensor,
        layers: Sequence[Linear],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        given: Input,
    ) -> None:
        self._x, self._layers = x, layers
        # who is told of what autograd keeps, as an activation checkpoint is
        self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._read = _Read(given, x.shape, weights, [layer._out_first for layer in layers])
        self._results: list[Tensor | None] = list(_Products.apply(kept, self._read, *weights, *biases))

    def product(self, number: int) -> Tensor | None:
        """The product of one of the layers, once; ``None`` if it must be computed apart.

        So it must if what autograd keeps goes elsewhere than it went for the layer that came first, as in an
        activation checkpoint that only some of the layers are in.
        """
        result, layer, read = self._results[number], self._layers[number], self._read
        weight = read.weights[number]
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if result is None or layer._parameters.get("weight") is not weight or hooks != self._hooks:
            return None
        self._results[number] = None
        read.versions[number] = weight._version
        read.products[number] = products = layer.products
        torch._C._set_grad_enabled(False)  # what torch.no_grad() does, at a tenth of its cost
        try:
            result.data = product(self._x, weight, layer._parameters.get("bias"), layer._out_first, products)
        finally:
            torch._C._set_grad_enabled(True)
        return result


def siblings_of(x: Tensor, kept: Tensor, layers: Sequence[Linear], given: Input) -> Siblings | None:
    """The products of ``x`` with the weights of ``layers``, if they are plain ones; see :class:`Siblings`.

    Not if a weight is anything but a parameter of ``x``'s dtype on its device, as one that a hook or a
    parametrization computes when the layer is called, and not under autocast.
    """
    if type(x) is not Tensor or x.is_meta or torch.is_autocast_enabled(x.device.type):
        return None
    weights, biases = [], []
    for layer in layers:
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        own = layer.__dict__
        if (
            weight is None
            or layer._forward_pre_hooks
            or layer.instead is not None
            or "weight" in own
            or "bias" in own
            or type(weight) not in _PLAIN
            or weight.dtype != x.dtype
            or weight.device != x.device
        ):
            return None
        weights.append(weight)
        biases.append(bias)
    return Siblings(x, kept, layers, weights, biases, given)


_PLAIN = (nn.Parameter, Tensor)


class _Read:
    """What the backward needs besides the value: the weights, as they were when their layers were called.

    They are not kept by autograd, which would look after those of layers that have not been called too.
    """

    __slots__ = ("given", "out_first", "products", "shape", "versions", "weights")

    def __init__(
        self,
        given: Input,
        shape: torch.Size,
        weights: Sequence[Tensor],
        out_first: Sequence[bool],
    ) -> None:
        self.given, self.shape, self.weights, self.out_first = given, shape, weights, out_first
        self.versions, self.products = [-1] * len(weights), [BY_TORCH] * len(weights)

    def check(self, number: int) -> None:
        """Raise if a weight has changed, as autograd does.

        Raises:
            RuntimeError: if it has been written into since its layer was called.
        """
        weight = self.weights[number]
        if weight._version != self.versions[number]:
            raise RuntimeError(
                f"a weight of {list(weight.shape)} has been modified by an inplace operation since the layer "
                f"that reads it was called ({self.given.label}): it is at version {weight._version}; "
                f"expected version {self.versions[number]}. Call backward before the weight is changed."
            )


class _Products(torch.autograd.Function):
    """I x V, V, ... -> V, V, ... (or V x V, V, ...): memory for the products."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, read: _Read, *operands: Tensor | None) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[2 : 2 + len(read.weights)]
        # as torch's own: what frozen weights are multiplied with is not kept
        ctx.save_for_backward(kept if any(needs) else None)
        ctx.set_materialize_grads(False)
        ctx.read = read
        rest = read.shape[:-1]
        return tuple(
            kept.new_empty((*rest, weight.shape[0 if out_first else 1]))
            for weight, out_first in zip(read.weights, read.out_first, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        read: _Read = ctx.read
        needs_kept, _, *needs = ctx.needs_input_grad
        used: list[tuple[int, Tensor]] = []
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                read.check(number)
                used.append((number, as_rows(gradient)))
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        given, wanted = read.given, kept is not None and any(needs[number] for number, _ in used)
        gathering = given.start_whole(kept) if wanted else None
        kept_gradient = pending = None
        if needs_kept:
            x_gradient = _gradient_of_value(read, used).view(read.shape)
            if x_gradient.requires_grad:  # a second derivative will be taken
                kept_gradient = given.sum(x_gradient)
            else:
                pending = given.start_sum(x_gradient)
            del x_gradient
        found: list[Tensor | None] = [None] * len(needs)
        if wanted:
            # it meets each rank's own gradient: its second derivative is partial
            x = entered(kept, given.ranks, given.label) if gathering is None else gathering.wait()
            x = as_rows(x)
        for number, rows in used:
            if needs[number]:
                operands = rows, x, read.weights[number], read.out_first[number], read.products[number]
                compute = partial(gradient_of_weight, *operands)
                found[number] = now_or_later(ctx.next_functions[1 + number][0], compute)
            if needs[len(gradients) + number]:
                found[len(gradients) + number] = rows.sum(0)
        if pending is not None:
            kept_gradient = pending.wait()
        return kept_gradient, None, *found


def _gradient_of_value(read: _Read, used: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The sum of what comes from each of the layers, not reduced: a matrix."""
    (number, rows), *others = used
    total = gradient_of_input(rows, read.weights[number], read.out_first[number], read.products[number])
    # autocast, which may be on in a backward too, would give another dtype than the memory has
    in_place = not torch.is_grad_enabled() and not torch.is_autocast_enabled(total.device.type)
    for number, rows in others:
        operands = rows, read.weights[number], read.out_first[number], read.products[number]
        if in_place:
            add_gradient_of_input(total, *operands)
        else:
            total = total + gradient_of_input(*operands)
    return total
