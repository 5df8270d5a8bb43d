"""The tensors that ``torch.distributed`` hands to a collective, as memory that can be read and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain(tensor: Tensor) -> Tensor:
    """The tensor as it can be read from its address: contiguous, its numbers as they are.

    Raises:
        ValueError: see :func:`real`.
    """
    return real(tensor).resolve_conj().resolve_neg().contiguous()


def real(tensor: Tensor) -> Tensor:
    """The tensor that has the memory: what a functional collective gives, perhaps under way, has none.

    Raises:
        ValueError: if it is of another type that only wraps tensors.
    """
    kind: type = type(tensor)
    untyped: Any = tensor
    if kind is Tensor or not is_traceable_wrapper_subclass(untyped):
        return tensor
    if issubclass(kind, AsyncCollectiveTensor):
        return cast(Tensor, cast(Any, tensor).trigger_wait())
    raise ValueError(f"a {kind.__name__} has no memory of its own: give collectives its local tensor")


def copy_back(buffer: Tensor, tensor: Tensor) -> None:
    """Into a tensor whose memory was not written to itself; also one that requires a gradient."""
    if buffer is not tensor:
        tensor.detach().copy_(buffer)


def check_dtypes(tensors: Sequence[Tensor]) -> None:
    """Raise unless all have one dtype.

    Raises:
        ValueError: naming what they have.
    """
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"tensors of one dtype are needed, not {[tensor.dtype for tensor in tensors]}")


def part_sizes(tensor: Tensor, sizes: Sequence[int], ranks: int) -> list[int]:
    """Elements of each rank's part of a tensor that is cut along its first dimension.

    Raises:
        ValueError: if rows cannot be cut so.
    """
    extent = tensor.shape[0] if tensor.dim() else 1
    row = tensor.numel() // extent if extent else 0
    if not sizes:
        if extent % ranks:
            raise ValueError(
                f"all_to_all: {extent} rows cannot be cut over {ranks} ranks equally: give sizes"
            )
        return [extent // ranks * row] * ranks
    if len(sizes) != ranks or sum(sizes) != extent:
        raise ValueError(f"all_to_all: the sizes {list(sizes)} do not cut {extent} rows over {ranks} ranks")
    return [size * row for size in sizes]
