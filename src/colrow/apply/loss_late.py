"""Logits whose numbers are computed when somebody asks for them, or never.

The loss that a model computes from its logits needs them for some tokens at a time only
(:mod:`colrow.layers.linear_cross_entropy`). So the logits layer gives :class:`LocalLogits` without numbers,
which know from which hidden states they come, and of which token each row is. What models do with logits
before their loss is followed without numbers (:mod:`colrow.apply.loss_followed`). For anything else the
logits are computed as they would have been, with the same gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from colrow.apply.loss_tensor import LocalLogits, Vocabulary
from colrow.collectives import Enter
from colrow.errors import PlanError
from colrow.layers.linear_cross_entropy import column_cross_entropy
from colrow.layers.linear_functions import ColumnWeights, autocast, column_linear


class Origin:
    """What the logits layer was called with, and all logits that come from it.

    Args:
        operands: hidden states, [..., features], R; this rank's weight; its bias, if there is one.
        layer: how they are multiplied; its input has been entered.
        label: names the layer in errors.
    """

    def __init__(self, operands: tuple[Tensor, ...], layer: ColumnWeights, label: str) -> None:
        self._operands, self._layer, self._label = operands, layer, label
        self._records = torch.is_grad_enabled()
        self._states = [_state(one) for one in operands]
        self._values: Tensor | None = None
        self._all: weakref.WeakSet[Late] = weakref.WeakSet()

    @property
    def is_late(self) -> bool:
        """Whether nobody has asked for numbers, and gradients are recorded or not, as they were."""
        return self._values is None and torch.is_grad_enabled() == self._records

    def add(self, late: Late) -> None:
        """Note what comes from here."""
        self._all.add(late)

    def operands(self) -> tuple[Tensor, ...]:
        """What the layer was called with.

        Raises:
            PlanError: if it has changed since.
        """
        if [_state(one) for one in self._operands] != self._states:
            raise PlanError(
                self._label,
                "its logits are asked for after its input or its weights have changed, and had not been "
                "computed before: the model's loss needs them for some tokens at a time only",
                "Read logits (.local, .gather()) before the optimizer's step, or say 'fused: false' of the "
                "plan's loss.",
            )
        return self._operands

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the layer gives for such operands: [..., this rank's ids]."""
        one = self._layer
        with self.modes():
            return column_linear(
                x, weight, bias, one.ranks, one.label, one.out_first, one.products, one.is_entered
            )

    def get(self) -> Tensor:
        """What the layer gives; always the same tensor.

        Raises:
            PlanError: as :meth:`operands`.
        """
        if self._values is None:
            self._values = self.multiply(*self.operands())
        return self._values

    def get_all(self) -> None:
        """Compute everything that comes from here: one of them is about to be written into."""
        for late in list(self._all):
            late.get()

    def loss(self, rows: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The loss of some tokens, without keeping logits.

        Args:
            rows: like ``target``, which token each is of.
            options: of :func:`colrow.layers.linear_cross_entropy.column_cross_entropy`.

        Raises:
            PlanError: as :meth:`operands`.
        """
        x, weight, *bias = self.operands()
        x, flat = x.reshape(-1, x.shape[-1]), rows.flatten()
        first, count = int(flat[0]) if len(flat) else 0, len(flat)
        with self.modes():
            if torch.equal(flat, torch.arange(first, first + count)):
                x = x if count == len(x) else x[first : first + count]
            else:
                x = x.index_select(0, flat.to(x.device))
            x = x.view(*rows.shape, x.shape[-1])
            return column_cross_entropy(x, weight, bias[0] if bias else None, target, self._layer, **options)

    def modes(self) -> AbstractContextManager[None]:
        """Gradients are recorded as they were, and operands, which have been cast, stay as they are."""
        device = _autocast_device(self._operands[0])
        if torch.is_grad_enabled() == self._records and not torch.is_autocast_enabled(device):
            return nullcontext()
        return _modes(self._records, device)


@contextmanager
def _modes(records: bool, device: str) -> Iterator[None]:
    with torch.set_grad_enabled(records), torch.autocast(device, enabled=False):
        yield


def _autocast_device(tensor: Tensor) -> str:
    """Whose autocast a tensor is under; there is none of the meta device."""
    return "cpu" if tensor.is_meta else tensor.device.type


def _state(tensor: Tensor) -> tuple[int, ...]:
    """Another one after the tensor has been written into, or has got other memory or none."""
    if tensor.is_meta:
        return ()
    version = -1 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.untyped_storage().size(), *tensor.shape


class Late:
    """The numbers of logits that have been given without.

    Args:
        origin: from where they come.
        rows: like the logits with one id: of which token each is.
        changes: what each logit has gone through since.
        compute: gives them.
    """

    def __init__(
        self,
        origin: Origin,
        rows: Tensor,
        changes: tuple[Callable[[Tensor], Tensor], ...],
        compute: Callable[[], Tensor],
    ) -> None:
        self.origin, self.rows, self.changes = origin, rows, changes
        self._compute = compute
        self._values: Tensor | None = None
        origin.add(self)

    @property
    def is_there(self) -> bool:
        """Whether they have been computed."""
        return self._values is not None

    def get(self) -> Tensor:
        """This rank's part as an ordinary tensor; always the same one."""
        if self._values is None:
            with self.origin.modes():
                self._values = self._compute()
        return self._values

    def change(self) -> Callable[[Tensor], Tensor] | None:
        """What the logits have gone through on the way to a loss, which widens them itself."""
        changes = self.changes
        if changes and isinstance(changes[-1], Cast) and changes[-1].is_wider:
            changes = changes[:-1]
        if not changes:
            return None

        def change(values: Tensor) -> Tensor:
            for one in changes:
                values = one(values)
            return values

        return change


@dataclass(frozen=True)
class Cast:
    """To ``dtype``; ``is_wider`` if that is single precision from less."""

    dtype: torch.dtype
    is_wider: bool

    def __call__(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)


class _Outside(torch.autograd.Function):
    """A tensor without numbers, at the place in the graph of what ``compute`` would give.

    For gradients that come past what is asked of logits: from autograd functions of others, which see the
    tensor itself.

    Args:
        operands: gives the numbers of ``inputs``.
        inputs: of ``compute``, themselves perhaps without numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        compute: Callable[..., Tensor],
        operands: Callable[[], tuple[Tensor, ...]],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.compute, ctx.operands = compute, operands
        return inputs[0].new_empty((), dtype=dtype).expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[4:]
        operands = [
            one.detach().requires_grad_(need) for one, need in zip(ctx.operands(), needs, strict=True)
        ]
        with torch.enable_grad():
            result = ctx.compute(*operands)
        wanted = [one for one in operands if one.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, gradient))
        return *4 * (None,), *(next(found) if need else None for need in needs)


def late_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, layer: ColumnWeights, vocabulary: Vocabulary, label: str
) -> LocalLogits | None:
    """What a logits layer gives without computing it; ``None`` where the loss would need all of it anyway.

    Args:
        x, weight, bias: as the layer would multiply them.
        layer: how it would.
        vocabulary: which ids it gives.
        label: names the layer in errors.
    """
    device = _autocast_device(x)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # the loss's small gradients would vanish in float16 before a scale is multiplied in
    if torch.float16 in (dtype, x.dtype) or any(
        type(one) not in (Tensor, nn.Parameter) for one in (x, weight)
    ):
        return None
    if not layer.is_entered:  # once, whoever reads them
        x = Enter(layer.ranks, layer.label)(x)
        layer = replace(layer, is_entered=True)
    operands = tuple(one for one in autocast(x, weight, bias) if one is not None)
    x, weight = operands[:2]
    origin = Origin(operands, layer, label)
    shape = (*x.shape[:-1], weight.shape[0 if layer.out_first else 1])
    place = "meta" if x.is_meta else "cpu"
    rows = torch.arange(prod(shape[:-1]), device=place).view(*shape[:-1], 1)
    late = Late(origin, rows, (), origin.get)
    outside = _Outside.apply(shape, x.dtype, origin.multiply, origin.operands, *operands)
    return late_of(outside, vocabulary, x.dim() - 1, late)


def late_of(outside: Tensor, vocabulary: Vocabulary, dimension: int, late: Late) -> LocalLogits:
    """Logits that get their numbers from ``late``."""
    logits = LocalLogits.of(outside, vocabulary, dimension)
    logits.late = late
    return logits


def made_from(
    logits: LocalLogits,
    function: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    dimension: int,
    dtype: torch.dtype,
    rows: Tensor,
    changes: tuple[Callable[[Tensor], Tensor], ...],
    keeps_order: bool = False,
) -> LocalLogits:
    """What a function gives for late logits, without numbers.

    Args:
        logits: for which it is called.
        function: of their numbers.
        shape, dimension, dtype: of the result, and where its vocabulary is.
        rows, changes: as of :class:`Late`.
        keeps_order: the result has the same elements in the same order.
    """
    before = logits.late
    assert before is not None
    if keeps_order:
        outside = logits.outside.view(shape)  # it is of one element: no shape is impossible
    else:
        outside = _Outside.apply(shape, dtype, function, lambda: (before.get(),), logits.outside)
    late = Late(before.origin, rows, changes, lambda: function(before.get()))
    return late_of(outside, logits.vocabulary, dimension, late)
