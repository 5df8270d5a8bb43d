"""One entry for all the layers that read one value."""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

from colrow.collectives import Communicator, Enter


class SharedEntry:
    """Enters a value once, however many column-parallel layers read it: q, k and v; gate and up.

    Each entry costs an all-reduce in the backward pass. Layers that share an entry get the same entered
    tensor as long as they are given the same tensor; given another one (as in cross-attention, where q reads
    one value and k and v another), they enter that.
    """

    def __init__(self, communicator: Communicator, label: str) -> None:
        self._enter = Enter(communicator, label)
        self._value: ref[Tensor] | None = None
        self._entered: Tensor | None = None
        self._version = -1

    def _forget(self, value: ref[Tensor]) -> None:
        if self._value is value:
            self._value = self._entered = None

    def __deepcopy__(self, memo: dict[int, object]) -> SharedEntry:
        # layers that shared an entry share the copy of it; memo is keyed by identity
        copied = SharedEntry(self._enter.communicator, self._enter.label)
        memo[id(self)] = copied
        return copied

    def __call__(self, value: Tensor) -> Tensor:
        """The entered ``value``; no autograd node unless a gradient will come back."""
        if not (value.requires_grad and torch.is_grad_enabled()):
            return value
        known = self._value() if self._value is not None else None
        if self._entered is not None and known is value and self._version == value._version:
            return self._entered
        entered = self._enter(value)
        # the entered tensor shares the value's memory and is forgotten with it: no activation is kept alive
        self._value, self._entered, self._version = ref(value, self._forget), entered, value._version
        return entered
