"""One entry for all the layers that read one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Variable

from colrow.collectives import Communicator, Enter
from colrow.layers.inputs import WholeInput
from colrow.layers.siblings import Linear, Siblings, siblings_of
from colrow.tracer import comptime, recall, remember


class LayerEntry(Protocol):
    """What linear layers that read one value have in common."""

    def join(self, layer: Linear) -> int:
        """Let a layer take part; the number that it is known by."""

    def product(self, number: int, value: Tensor) -> Tensor | None:
        """The layer's product of what it is given, entered; ``None`` if it must compute that itself."""

    def __call__(self, value: Tensor) -> Tensor:
        """What a layer that computes by itself goes on with."""


@dataclass(slots=True)
class _Value:
    """A value as it was when it was first read, what came of it, and how many layers have read it."""

    value: Tensor
    version: int
    entered: Tensor | None
    siblings: Siblings | None
    reads: int = 0


class SharedEntry:
    """Enters a value once, however many column-parallel layers read it: q, k and v; gate and up.

    Each entry costs an all-reduce in the backward pass. Layers that share an entry share it as long as they
    are given the same tensor. Two are remembered: in cross-attention q reads one value and k and v another,
    and where two sequences attend to each other the two take turns.

    Args:
        communicator: the tensor-parallel group.
        label: names the reduction in errors and statistics.
        members: number of layers that share it; when so many have read a value it is let go of. 0: unknown.
            Call :meth:`forget` where all of them have been called that will be. Then a layer may be called
            several times on one value, and computes its product by itself.
    """

    is_always_needed = False
    """Whether something is done with a value even if no gradient will come back."""

    def __init__(self, communicator: Communicator, label: str, members: int = 0) -> None:
        self._enter = Enter(communicator, label)
        self._input = WholeInput(communicator, label)
        self._members = members
        self._layers: list[Linear] = []
        self.forget()

    def forget(self) -> None:
        """Let go of the last values."""
        if torch.compiler.is_dynamo_compiling():
            return
        self._latest: _Value | None = None
        self._earlier: _Value | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_latest": None, "_earlier": None}  # activations are not copied

    def join(self, layer: Linear) -> int:
        """Let a linear layer share the entry by :meth:`product`; the number to give there."""
        self._layers.append(layer)
        return len(self._layers) - 1

    def __call__(self, value: Tensor) -> Tensor:
        """The entered ``value``; no autograd node unless a gradient will come back."""
        if not (self.is_always_needed or (value.requires_grad and torch.is_grad_enabled())):
            return value
        if self._members == 1:
            return self.enter(value)
        # calls of functions are too dear here: neither the next reader nor, where all have read what was
        # there before, the first makes any but those that enter
        found = self._latest
        if found is None or found.value is not value or found.version != value._version:
            if torch.compiler.is_dynamo_compiling():
                return self._traced(value, f"{self._enter.communicator.name} {self._enter.label}")
            if found is not None or self._earlier is not None:
                found = self._find(value)
        if found is None:
            entered = self.enter(value)
            found = _Value(value, value._version, entered, None)
            if self._latest is not None or torch._C._current_graph_task_id() != -1:
                self._remember(found)
            else:
                self._latest = found
        else:
            known = found.entered
            entered = self.enter(value) if known is None else known
            found.entered = entered
        found.reads += 1
        if found.reads == self._members:
            self._latest, self._earlier = self._earlier, None
        return entered

    def product(self, number: int, value: Tensor) -> Tensor | None:
        """The product of the layer that :meth:`join` gave this number with the entered ``value``.

        ``None`` if the layer must compute it itself: because no gradient will come back, or it is not one of
        several plain layers (see :func:`siblings_of`).
        """
        if not (value.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_dynamo_compiling():
            return None
        if not self._members:
            return None  # a layer may be called twice, but has one product
        found = self._latest
        if found is None or found.value is not value or found.version != value._version:
            found = self._find(value)
        if found is not None:
            if found.siblings is None:
                return None
            result = found.siblings.product(number)
            if result is not None:
                self._count(found)
                return result
        siblings = siblings_of(value, value, self._layers, self._input)
        if siblings is None:
            return None
        found = self._remember(_Value(value, value._version, None, siblings))
        self._count(found)
        return siblings.product(number)

    def _find(self, value: Tensor) -> _Value | None:
        """What is known of the value, which now is the latest."""
        latest, earlier = self._latest, self._earlier
        if latest is not None and latest.value is value and latest.version == value._version:
            return latest
        if earlier is not None and earlier.value is value and earlier.version == value._version:
            self._latest, self._earlier = earlier, latest
            return earlier
        return None

    def _remember(self, new: _Value) -> _Value:
        if self._latest is None or self._latest.value is not new.value:
            self._earlier = self._latest
        self._latest = new
        if torch._C._current_graph_task_id() != -1:
            # recomputed in a backward, where the end of a forward may not come
            Variable._execution_engine.queue_callback(self.forget)
        return new

    def _count(self, found: _Value) -> None:
        found.reads += 1
        if found.reads == self._members:
            # all have read it: no activation is kept alive
            self._latest, self._earlier = self._earlier, None

    def enter(self, value: Tensor) -> Tensor:
        """The entered value, a new one."""
        return self._enter(value)

    def _traced(self, value: Tensor, name: str) -> Tensor:
        """Under torch.compile the graph remembers, for this object's attributes are not part of it."""
        result = None
        comptime(recall)
        if result is None:
            result = self.enter(value)
            comptime(remember)
        return result
