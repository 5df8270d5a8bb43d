"""Which values of a trace carry gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from colrow.trace.records import Operation, Value
from colrow.trace.values import ValueTable


class Gradients:
    """Finds out which values carry gradients.

    The run is recorded by autograd, which says so of every tensor itself, ``no_grad`` regions and ``detach``
    included. The exception is the inside of ``autograd.Function.forward``: autograd is switched off there
    although the result will carry a gradient.
    """

    def __init__(self, table: ValueTable) -> None:
        self._table = table
        # by index: computed from values that carry gradients, whether autograd recorded it or not
        self._dependent: set[int] = set()
        self._unrecorded: set[int] = set()
        self._copies: list[tuple[Value, Value]] = []

    def begin(self, value: Value, tensor: Tensor) -> None:
        """A value comes in that no operator computes."""
        if tensor.requires_grad:
            self._dependent.add(value.index)

    def follow(self, inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> None:
        """An operator computes values from others."""
        recorded = torch.is_grad_enabled()
        if any(value.index in self._dependent for value in inputs):
            for value in outputs:
                if value.dtype.is_floating_point or value.dtype.is_complex:
                    self._dependent.add(value.index)
                    if not recorded:
                        self._unrecorded.add(value.index)

    def copy(self, original: Value, value: Value) -> None:
        """A value of a copied layer carries a gradient if the original does."""
        self._copies.append((original, value))
        if original.index in self._dependent:
            self._dependent.add(value.index)

    def finish(self, operations: list[Operation]) -> None:
        """Write the answer to the values."""
        for value in self._table.values:
            value.differentiable = self._table.carries_gradient(value)
        for operation in reversed(operations):
            if any(value.differentiable and value.index in self._unrecorded for value in operation.outputs):
                for source in operation.inputs:
                    source.differentiable = source.differentiable or source.index in self._dependent
        for original, value in self._copies:
            value.differentiable = original.differentiable
