"""One entry for all the layers that read one value."""

from __future__ import annotations

import torch
from torch import Tensor

from colrow.collectives import Communicator, Enter
from colrow.tracer import comptime, recall, remember


class SharedEntry:
    """Enters a value once, however many column-parallel layers read it: q, k and v; gate and up.

    Each entry costs an all-reduce in the backward pass. Layers that share an entry get the same entered
    tensor as long as they are given the same tensor; given another one (as in cross-attention, where q reads
    one value and k and v another), they enter that.

    Args:
        communicator: the tensor-parallel group.
        label: names the reduction in errors and statistics.
        members: number of layers that share it; when so many have read a value it is let go of. 0: unknown;
            then :meth:`forget` must be called.
    """

    def __init__(self, communicator: Communicator, label: str, members: int = 0) -> None:
        self._enter = Enter(communicator, label)
        self._members = members
        self.forget()

    def forget(self) -> None:
        """Let go of the last value."""
        if torch.compiler.is_dynamo_compiling():
            return
        self._value: Tensor | None = None
        self._entered: Tensor | None = None
        self._version, self._reads = -1, 0

    def __deepcopy__(self, memo: dict[int, object]) -> SharedEntry:
        # layers that shared an entry share the copy of it; memo is keyed by identity
        copied = SharedEntry(self._enter.communicator, self._enter.label, self._members)
        memo[id(self)] = copied
        return copied

    def __call__(self, value: Tensor) -> Tensor:
        """The entered ``value``; no autograd node unless a gradient will come back."""
        if not (value.requires_grad and torch.is_grad_enabled()):
            return value
        if torch.compiler.is_dynamo_compiling():
            return self._traced(value, f"{self._enter.communicator.name} {self._enter.label}")
        if self._value is not value or self._version != value._version:
            self._value, self._version, self._reads = value, value._version, 0
            self._entered = self._enter(value)
        self._reads += 1
        entered = self._entered
        assert entered is not None
        if self._reads == self._members:
            self.forget()  # all have read it: no activation is kept alive
        return entered

    def _traced(self, value: Tensor, name: str) -> Tensor:
        """Under torch.compile the graph remembers, for this object's attributes are not part of it."""
        result = None
        comptime(recall)
        if result is None:
            result = self._enter(value)
            comptime(remember)
        return result
