"""One entry for all the layers that read one value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colrow.collectives import Communicator, Enter
from colrow.tracer import comptime, recall, remember


@dataclass(slots=True)
class _Entered:
    """A value as it was when it was entered, what came of it, and how many layers have read that."""

    value: Tensor
    version: int
    result: Tensor
    reads: int = 0


class SharedEntry:
    """Enters a value once, however many column-parallel layers read it: q, k and v; gate and up.

    Each entry costs an all-reduce in the backward pass. Layers that share an entry get the same entered
    tensor as long as they are given the same tensor. Two are remembered: in cross-attention q reads one value
    and k and v another, and where two sequences attend to each other the two take turns.

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
        """Let go of the last values."""
        if torch.compiler.is_dynamo_compiling():
            return
        self._latest: _Entered | None = None
        self._earlier: _Entered | None = None

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
        latest = self._latest
        if latest is None or latest.value is not value or latest.version != value._version:
            latest = self._other(value)
        latest.reads += 1
        if latest.reads == self._members:
            # all have read it: no activation is kept alive
            self._latest, self._earlier = self._earlier, None
        return latest.result

    def _other(self, value: Tensor) -> _Entered:
        """The value before the last, or a new one, which now is the last."""
        found = self._earlier
        if found is None or found.value is not value or found.version != value._version:
            found = _Entered(value, value._version, self._enter(value))
        self._latest, self._earlier = found, self._latest
        return found

    def _traced(self, value: Tensor, name: str) -> Tensor:
        """Under torch.compile the graph remembers, for this object's attributes are not part of it."""
        result = None
        comptime(recall)
        if result is None:
            result = self._enter(value)
            comptime(remember)
        return result
