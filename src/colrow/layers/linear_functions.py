"""The autograd functions of parallel linear layers: one local product with its collective.

Their backwards are made of differentiable operators, so that second derivatives work; where none will be
taken, and it is faster, the products go to oneDNN (:mod:`colrow.layers.products`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.collectives import (
    AllReduce,
    Communicator,
    Enter,
    ReduceScatter,
    all_reduce_of,
    reduce_scatter_of,
)
from colrow.layers.later import is_collecting, now_or_later
from colrow.layers.products import Products, compiled_onednn, goes_to_onednn, onednn

FEATURES_PER_BLOCK = 1024
"""Of so many output features at a time a gradient of a weight is added to others."""


@dataclass(frozen=True)
class ColumnWeights:
    """How a column-parallel layer multiplies.

    Attributes:
        ranks: the group.
        label: names the reduction of the input's gradient.
        out_first: whether the weight is [out, in], as that of ``nn.Linear``, or [in, out], as ``Conv1D``'s.
        products: who multiplies.
        is_entered: whether the gradient of the input is reduced elsewhere.
    """

    ranks: Communicator
    label: str
    out_first: bool
    products: Products
    is_entered: bool


def local_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_first: bool, products: Products
) -> Tensor:
    """The product on this rank alone, differentiable: ``x`` [..., in], ``weight`` [out, in] or [in, out].

    Args:
        out_first: whether the weight is [out, in], as that of ``nn.Linear``; else as that of ``Conv1D``.
        products: who multiplies.
    """
    if is_collecting() and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _LocalLinear.apply(*autocast(x, weight, bias), out_first, products)
    if type(x) is not Tensor or not goes_to_onednn(products.rows_from, x, weight):
        return product(x, weight, bias, out_first)
    if torch.is_autocast_enabled(x.device.type):
        return product(x, weight, bias, out_first)
    if torch.compiler.is_compiling():
        both = (products.forward_from, products.backward_from)
        if not all(goes_to_onednn(rows, x, weight) for rows in both):
            return product(x, weight, bias, out_first)
        return _CompiledLinear.apply(x, weight, bias, out_first)
    if not torch.is_grad_enabled():
        return product(x, weight, bias, out_first, products)
    return _LocalLinear.apply(x, weight, bias, out_first, products)


def autocast(x: Tensor, *others: Tensor | None) -> Sequence[Tensor | None]:
    """The operands in autocast's dtype, as it would give them to ``F.linear``."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return [
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in (x, *others)
    ]


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_first: bool, products: Products | None = None
) -> Tensor:
    """The product without autograd of its own; arguments as of :func:`local_linear`."""
    if products is not None and goes_to_onednn(products.forward_from, x, weight):
        return onednn(x, weight if out_first else weight.t(), bias)
    if out_first:
        return F.linear(x, weight, bias)
    if bias is None:
        return x @ weight
    return torch.addmm(bias, as_rows(x), weight).view(*x.shape[:-1], weight.shape[1])  # as Conv1D does


def gradient_of_input(gradient: Tensor, weight: Tensor, out_first: bool, products: Products) -> Tensor:
    """[..., in], from the gradient of the result, [..., out]."""
    if not torch.is_grad_enabled() and goes_to_onednn(products.backward_from, gradient, weight):
        return onednn(gradient, weight.t() if out_first else weight)
    return gradient @ (weight if out_first else weight.t())


def add_gradient_of_input(
    total: Tensor, gradient: Tensor, weight: Tensor, out_first: bool, products: Products
) -> None:
    """:func:`gradient_of_input`, added to ``total`` in place; matrices of one dtype, no autograd."""
    if goes_to_onednn(products.backward_from, gradient, weight):
        total.add_(onednn(gradient, weight.t() if out_first else weight))
    else:
        torch.addmm(total, gradient, weight if out_first else weight.t(), out=total)


def as_rows(x: Tensor) -> Tensor:
    """[..., features] as a matrix; -1 would be ambiguous where a rank holds no features."""
    dimensions = x.dim()
    return x if dimensions == 2 else x.flatten(0, -2) if dimensions > 1 else x.unsqueeze(0)


def gradient_of_weight(
    gradient: Tensor, x: Tensor, weight: Tensor, out_first: bool, products: Products
) -> Tensor:
    """Of the weight's own shape, from the gradient of the result and ``x``."""
    if not torch.is_grad_enabled() and goes_to_onednn(products.backward_from, gradient, weight):
        left, right = (gradient, x) if out_first else (x, gradient)
        return onednn(as_rows(left).t(), as_rows(right).t())
    return as_rows(gradient).t() @ as_rows(x) if out_first else as_rows(x).t() @ as_rows(gradient)


def add_gradient_of_weight(
    total: Tensor,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    out_first: bool,
    products: Products,
    is_first: bool,
) -> None:
    """:func:`gradient_of_weight`, added to ``total`` in place, which may have a wider dtype.

    Args:
        gradient, x: matrices.
        is_first: ``total`` is empty memory.
    """
    if total.dtype == gradient.dtype and not goes_to_onednn(products.backward_from, gradient, weight):
        left, right = (gradient, x) if out_first else (x, gradient)
        torch.addmm(total, left.t(), right, beta=0.0 if is_first else 1.0, out=total)
        return
    # the product, and the copy that oneDNN makes of what is transposed, take memory for one block only
    for begin in range(0, gradient.shape[1], FEATURES_PER_BLOCK):
        block = slice(begin, begin + FEATURES_PER_BLOCK)
        part, into = (weight[block], total[block]) if out_first else (weight[:, block], total[:, block])
        added = gradient_of_weight(gradient[:, block], x, part, out_first, products)
        into.copy_(added) if is_first else into.add_(added)


def column_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranks: Communicator,
    label: str,
    out_first: bool,
    products: Products,
    is_entered: bool,
) -> Tensor:
    """A column-parallel product: ``x`` [..., in], I (R if it is entered) -> [..., this rank's out], V.

    Args:
        label: names the reduction of the input's gradient.
        is_entered: whether that gradient is reduced elsewhere.
        out_first, products: as in :func:`local_linear`.
    """
    if is_entered:
        return local_linear(x, weight, bias, out_first, products)
    if torch.compiler.is_compiling():  # which does the overlap itself, and autocast in the product
        return local_linear(Enter(ranks, label)(x), weight, bias, out_first, products)
    result: Tensor = ColumnLinear.apply(*autocast(x, weight, bias), ranks, label, out_first, products)
    return result


def entered(x: Tensor, ranks: Communicator, label: str) -> Tensor:
    """In a backward: a value, I, that meets parts; something else only if it is differentiated in turn."""
    return Enter(ranks, label)(x) if torch.is_grad_enabled() else x


def _no_view(result: Tensor) -> Tensor:
    """The same memory, not as a view: what a function of autograd gives may then be written into."""
    return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result


def _of_weight(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient of a function's second operand, its weight; ``None`` if it is left for later."""
    out_first, products = ctx.out_first, ctx.products
    return now_or_later(
        ctx.next_functions[1][0], lambda: gradient_of_weight(gradient, x, weight, out_first, products)
    )


class _LocalLinear(torch.autograd.Function):
    """V x V -> V, without a collective."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out_first: bool, products: Products
    ) -> Tensor:
        # as torch's own: what frozen weights are multiplied with is not kept
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.out_first, ctx.products = out_first, products
        return _no_view(product(x, weight, bias, out_first, products))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x_gradient = gradient_of_input(gradient, weight, ctx.out_first, ctx.products) if needs_x else None
        weight_gradient = None
        if needs_weight:
            weight_gradient = _of_weight(ctx, gradient, x, weight)
        bias_gradient = as_rows(gradient).sum(0) if needs_bias else None
        return x_gradient, weight_gradient, bias_gradient, None, None


class _CompiledLinear(torch.autograd.Function):
    """:class:`_LocalLinear` in a graph of torch.compile, which leaves out gradients that are not needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out_first: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.out_first, ctx.has_bias = out_first, bias is not None
        return compiled_onednn(x, weight if out_first else weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = compiled_onednn(gradient, weight.t() if ctx.out_first else weight)
        rows, read = as_rows(gradient), as_rows(x)
        left, right = (rows, read) if ctx.out_first else (read, rows)
        of_weight = compiled_onednn(left.t(), right.t())
        return of_x, of_weight, rows.sum(0) if ctx.has_bias else None, None


class ColumnLinear(torch.autograd.Function):
    """I x V -> V. The backward starts the reduction of the input's gradient, computes the weight's, waits."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ranks: Communicator,
        label: str,
        out_first: bool,
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.ranks, ctx.label, ctx.out_first, ctx.products = ranks, label, out_first, products
        return _no_view(product(x, weight, bias, out_first, products))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x_gradient = pending = weight_gradient = None
        if needs_x:
            x_gradient = gradient_of_input(gradient, weight, ctx.out_first, ctx.products)
            if x_gradient.requires_grad:  # a second derivative will be taken
                x_gradient = AllReduce(ctx.ranks, ctx.label)(x_gradient)
            else:
                pending = ctx.ranks.start_all_reduce(x_gradient, label=ctx.label, owned=True)
        if needs_weight:
            # here x meets each rank's own gradient: its second derivative is partial
            operand = entered(x, ctx.ranks, ctx.label)
            weight_gradient = _of_weight(ctx, gradient, operand, weight)
        bias_gradient = as_rows(gradient).sum(0) if needs_bias else None
        if pending is not None:
            x_gradient = pending.wait()
        return x_gradient, weight_gradient, bias_gradient, None, None, None, None


class RowLinear(torch.autograd.Function):
    """V x V -> I. The forward reduces in the memory of the product itself, and adds the bias once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ranks: Communicator,
        label: str,
        out_first: bool,
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.ranks, ctx.label, ctx.out_first, ctx.products = ranks, label, out_first, products
        if ranks.overlaps:
            written = weight.shape[0 if out_first else 1]
            result = all_reduce_of(
                ranks, x, written, lambda part: product(part, weight, None, out_first, products), label
            )
        else:
            partial = product(x, weight, None, out_first, products)
            result = ranks.start_all_reduce(partial, label=label, owned=True).wait()
        return result if bias is None else result.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # the gradient meets each rank's own shards: its second derivative is partial
        operand = entered(gradient, ctx.ranks, ctx.label)
        bias_gradient = as_rows(gradient).sum(0) if ctx.needs_input_grad[2] else None
        return *_row_gradients(ctx, operand), bias_gradient, None, None, None, None


class RowScatter(torch.autograd.Function):
    """V x V -> V: as :class:`RowLinear` without a bias, but each rank has its part of a sequence."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scatter: ReduceScatter, out_first: bool, products: Products
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.scatter, ctx.out_first, ctx.products = scatter, out_first, products
        return reduce_scatter_of(
            scatter.communicator,
            x,
            weight.shape[0 if out_first else 1],
            lambda part: product(part, weight, None, out_first, products),
            scatter.dimension,
            scatter.sizes or (),
            scatter.label,
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        whole = ctx.scatter.adjoint()(gradient)
        return *_row_gradients(ctx, whole), None, None, None


class RowProduct(torch.autograd.Function):
    """V x V -> P: what :class:`RowLinear` reduces. It keeps the same tensors, but before there is a sum.

    Activation checkpointing recomputes a forward until it has all tensors that were kept. Where this is the
    last one, there is no sum again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, out_first: bool, products: Products) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.out_first, ctx.products = out_first, products
        return _no_view(product(x, weight, None, out_first, products))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_row_gradients(ctx, gradient), None, None


def _row_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    x_gradient = weight_gradient = None
    if ctx.needs_input_grad[0]:
        x_gradient = gradient_of_input(gradient, weight, ctx.out_first, ctx.products)
    if ctx.needs_input_grad[1]:
        weight_gradient = _of_weight(ctx, gradient, x, weight)
    return x_gradient, weight_gradient
