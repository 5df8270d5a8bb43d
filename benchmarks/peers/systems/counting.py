"""Counting the collectives of any system, by the operators that torch dispatches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACES = ("c10d", "_c10d_functional", "deepspeed")
"""Operators of torch.distributed, of functional collectives, and of DeepSpeed's shared memory."""
COLLECTIVES = ("reduce", "gather", "scatter", "to_all", "toall", "broadcast")
"""Parts of their names; the others wait, or wrap results."""


@dataclass
class Moved:
    """Collectives that one rank took part in, and their payload: the reduced tensor, or the gathered one."""

    collectives: int = 0
    bytes: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved = Moved()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        # a DTensor does its collectives on the tensors inside: let it come to them first
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented
        result = function(*arguments, **(keywords or {}))
        packet = getattr(function, "_overloadpacket", None)
        namespace, _, name = str(packet).rpartition(".")
        if namespace in NAMESPACES and any(part in name for part in COLLECTIVES) and _others(arguments):
            self.moved.collectives += 1
            # a c10d operator fills tensors that it is given; the payload is the largest side
            self.moved.bytes += max(_bytes(side) for side in (*arguments, result))
        return result


def _others(arguments: Sequence[Any]) -> bool:
    """Whether the operator's group, if it names one, has other ranks than this."""
    groups: dict[str, dist.ProcessGroup] = {
        name: group for group, name in dist.distributed_c10d._world.pg_names.items()
    }
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument).size() > 1
        if isinstance(argument, str) and argument in groups:
            return groups[argument].size() > 1
    return True


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_bytes(item) for item in value)
    return 0


@contextmanager
def counted() -> Iterator[Moved]:
    """What is communicated in the block; complete when it ends. Slows everything down."""
    with _Counter() as counter:
        yield counter.moved
