"""The values of a trace in the making, found by the tensors that stand for them."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from colrow.trace.records import Source, Value


class ValueTable:
    """Values by tensor.

    Every value that can still be used has one meta tensor. Tensors with data that the program brings along
    have a *twin* on meta that runs in their place, so that the whole run stays on one device.

    Attributes:
        values: all values by their index; the trace's own list.
    """

    def __init__(self, values: list[Value]) -> None:
        self.values = values
        self._by_tensor: dict[int, Value] = {}
        self._tensors: dict[int, Tensor] = {}
        self._twins: dict[int, Tensor] = {}
        self._others: dict[int, list[Tensor]] = defaultdict(list)
        # ids are only unique among tensors that live
        self._alive: list[Tensor] = []
        self._storages: dict[int, int] = {}
        self._storage_count = 0
        self._by_storage: dict[int, list[Value]] = defaultdict(list)

    def find(self, tensor: Tensor) -> Value | None:
        """The value of a tensor, if it is part of the trace."""
        return self._by_tensor.get(id(tensor))

    def tensor_of(self, value: Value) -> Tensor | None:
        """The meta tensor of a value; None for values inside of copied layers."""
        return self._tensors.get(value.index)

    def twin(self, tensor: Tensor) -> Tensor:
        """The meta tensor that runs in place of a given one."""
        return self._twins.get(id(tensor), tensor)

    def add(self, tensor: Tensor, source: Source, content: Tensor | None = None) -> Value:
        """A new value for a tensor. Its twin on meta takes part in the run if it is not on meta itself."""
        running = tensor
        if not tensor.is_meta:
            running = tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
            self._twins[id(tensor)] = running
            self._by_tensor[id(running)] = value = self._new(running, source, content)
            self._alive.append(tensor)
        else:
            value = self._new(running, source, content)
        self._by_tensor[id(tensor)] = value
        return value

    def _new(self, tensor: Tensor, source: Source, content: Tensor | None) -> Value:
        pointer = tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
        if pointer not in self._storages:
            self._storages[pointer] = self.new_storage()
        value = self.add_detached(tuple(tensor.shape), tensor.dtype, source, self._storages[pointer], content)
        self._tensors[value.index] = tensor
        return value

    def new_storage(self) -> int:
        """A number for memory that no value has so far."""
        self._storage_count += 1
        return self._storage_count - 1

    def add_detached(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        source: Source,
        storage: int,
        content: Tensor | None,
    ) -> Value:
        """A new value without a tensor."""
        value = Value(len(self.values), shape, dtype, source, storage, content=content)
        self.values.append(value)
        self._by_storage[storage].append(value)
        return value

    def attach(self, value: Value, tensor: Tensor) -> None:
        """Let a tensor on meta stand for a value that has none."""
        self._tensors[value.index] = tensor
        self._by_tensor[id(tensor)] = value
        self._storages[tensor.untyped_storage()._cdata] = value.storage

    def alias(self, value: Value, tensor: Tensor) -> None:
        """Let another tensor stand for a value too: same memory, same shape."""
        self._by_tensor[id(tensor)] = value
        self._others[value.index].append(tensor)

    def carries_gradient(self, value: Value) -> bool:
        """Whether a tensor that stands for the value does, as when it was written into."""
        tensors = [self._tensors.get(value.index), *self._others.get(value.index, ())]
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def aliases(self, value: Value) -> list[Value]:
        """The values that share memory with one, itself included."""
        return self._by_storage[value.storage]
