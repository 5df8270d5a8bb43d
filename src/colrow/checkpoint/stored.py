"""Tensors whose numbers stay in a file until a part of them is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Box: TypeAlias = tuple[tuple[int, int], ...]
"""For each dimension the first index, and the one behind the last."""


class StoredTensor(Tensor):
    """Has a shape and a dtype; :meth:`part` reads.

    What moves elements about (stacking, concatenating, splitting, slicing, transposing) gives another one, so
    that of stacked experts only those are read that a rank holds. Whatever else is computed with it reads all
    of it, and gives a plain tensor.

    Args:
        shape: of the whole.
        dtype: of the elements.
        read: gives the elements in a box, as a plain tensor.
    """

    _read: Callable[[Box], Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, read: Callable[[Box], Tensor]) -> StoredTensor:
        made: StoredTensor = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        made._read = read
        return made

    def part(self, box: Box) -> Tensor:
        """The elements in a box; none of the others is read."""
        return self._read(box)

    def whole(self) -> Tensor:
        """All of it."""
        return self._read(tuple((0, size) for size in self.shape))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        move = _MOVES.get(function)
        if move is not None:
            return move(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(StoredTensor, StoredTensor.whole, (args, dict(kwargs or {})))
        return function(*args, **kwargs)


def as_stored(tensor: Tensor) -> StoredTensor:
    """A tensor as one that is read in parts."""
    return (
        tensor
        if isinstance(tensor, StoredTensor)
        else StoredTensor(tensor.shape, tensor.dtype, _reader(tensor))
    )


def _reader(tensor: Tensor) -> Callable[[Box], Tensor]:
    if isinstance(tensor, StoredTensor):
        return tensor.part
    return lambda box: tensor[tuple(slice(low, high) for low, high in box)]


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> StoredTensor:
    first = tensors[0]
    dim %= first.dim() + 1
    readers = [_reader(one) for one in tensors]

    def read(box: Box) -> Tensor:
        inner = (*box[:dim], *box[dim + 1 :])
        chosen = readers[slice(*box[dim])]
        if not chosen:
            return torch.empty([high - low for low, high in box], dtype=first.dtype)
        return torch.stack([one(inner) for one in chosen], dim)

    return StoredTensor((*first.shape[:dim], len(tensors), *first.shape[dim:]), first.dtype, read)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> StoredTensor:
    first = tensors[0]
    dim %= first.dim()
    sizes, readers = [one.shape[dim] for one in tensors], [_reader(one) for one in tensors]

    def read(box: Box) -> Tensor:
        parts, begin = [], 0
        for size, one in zip(sizes, readers, strict=True):
            low, high = max(box[dim][0] - begin, 0), min(box[dim][1] - begin, size)
            if low < high:
                parts.append(one((*box[:dim], (low, high), *box[dim + 1 :])))
            begin += size
        if not parts:
            return torch.empty([high - low for low, high in box], dtype=first.dtype)
        return torch.cat(parts, dim)

    return StoredTensor((*first.shape[:dim], sum(sizes), *first.shape[dim + 1 :]), first.dtype, read)


def _slice(
    tensor: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    dim %= tensor.dim()
    begin, stop, step = slice(start, end, step).indices(tensor.shape[dim])
    if step != 1:
        assert isinstance(tensor, StoredTensor)
        return torch.ops.aten.slice.Tensor(tensor.whole(), dim, start, end, step)
    reader = _reader(tensor)

    def read(box: Box) -> Tensor:
        low, high = box[dim]
        return reader((*box[:dim], (begin + low, begin + high), *box[dim + 1 :]))

    size = max(stop - begin, 0)
    return StoredTensor((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]), tensor.dtype, read)


def _split_with_sizes(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Any]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [_slice(tensor, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _split(tensor: Tensor, size: int, dim: int = 0) -> list[Any]:
    extent = tensor.shape[dim]
    return [_slice(tensor, dim, begin, min(begin + size, extent)) for begin in range(0, extent, size)]


def _permute(tensor: Tensor, dims: Sequence[int]) -> StoredTensor:
    order = [one % tensor.dim() for one in dims]
    reader = _reader(tensor)

    def read(box: Box) -> Tensor:
        original: list[tuple[int, int]] = [(0, 0)] * len(order)
        for place, dimension in enumerate(order):
            original[dimension] = box[place]
        return reader(tuple(original)).permute(order)

    return StoredTensor([tensor.shape[one] for one in order], tensor.dtype, read)


def _transpose(tensor: Tensor, first: int, second: int) -> StoredTensor:
    order = list(range(tensor.dim()))
    order[first], order[second] = order[second], order[first]
    return _permute(tensor, order)


def _same(tensor: Tensor, **_: Any) -> StoredTensor:
    """Another tensor of the same elements: nothing can be written into them."""
    return StoredTensor(tensor.shape, tensor.dtype, _reader(tensor))


_MOVES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.stack.default: _stack,
    torch.ops.aten.cat.default: _cat,
    torch.ops.aten.slice.Tensor: _slice,
    torch.ops.aten.split.Tensor: _split,
    torch.ops.aten.split_with_sizes.default: _split_with_sizes,
    torch.ops.aten.permute.default: _permute,
    torch.ops.aten.transpose.int: _transpose,
    torch.ops.aten.t.default: lambda tensor: (
        _transpose(tensor, 0, -1) if tensor.dim() == 2 else _same(tensor)
    ),
    torch.ops.aten.clone.default: _same,
    torch.ops.aten.detach.default: _same,
}
