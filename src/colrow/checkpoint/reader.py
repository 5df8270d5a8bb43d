"""Reading a rank's part of tensors from a folder of safetensors files, and nothing more than that part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colrow.checkpoint.stored import StoredTensor
from colrow.layout import TensorLayout


class SafetensorsFolder:
    """The tensors of a folder in the hub's layout: one file, or several with an index.

    Args:
        folder: where the files are.
        stem: ``model`` for ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no safetensors.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        self._folder = folder
        self._files: dict[Path, Any] = {}
        self.metadata: dict[str, str] = {}
        """Strings that were saved with the tensors."""
        if single.exists():  # before the index, as transformers does
            mapping = dict.fromkeys(self._open(single).keys(), single.name)
            self.metadata = self._open(single).metadata() or {}
        elif index.exists():
            content = json.loads(index.read_text())
            mapping = content["weight_map"]
            self.metadata = content.get("metadata", {})
        else:
            raise FileNotFoundError(f"there is neither {single.name} nor {index.name} in {folder}")
        self._mapping = mapping  # the file of each tensor
        self._names_in_files: dict[str, str] = {}  # of those that have been renamed
        self._made: dict[str, StoredTensor] = {}

    def _open(self, path: Path) -> Any:
        # an extra: whoever only cuts models need not have it
        from safetensors import safe_open

        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]

    @property
    def names(self) -> set[str]:
        return {*self._mapping, *self._made}

    def rename(self, name: str, new: str) -> None:
        """Let a tensor have another name."""
        self._mapping[new] = self._mapping.pop(name)
        self._names_in_files[new] = self._names_in_files.pop(name, name)

    def replace(self, names: Iterable[str], made: Mapping[str, StoredTensor]) -> None:
        """Have other tensors in place of some, of which they were made."""
        for name in names:
            del self._mapping[name]
        self._made.update(made)

    def stored(self, name: str) -> StoredTensor:
        """A tensor to compute with, which is read later, as far as it is wanted."""
        if name in self._made:
            return self._made[name]
        source, shape = self._slice(name), self.shape(name)
        if not shape:
            value: Tensor = self._open(self._folder / self._mapping[name]).get_tensor(self._in_file(name))
            return StoredTensor((), value.dtype, lambda box: value)
        # slices of nothing have a dtype
        dtype = source[tuple(slice(0, 0) for _ in shape)].dtype
        return StoredTensor(shape, dtype, lambda box: source[tuple(slice(*one) for one in box)])

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape of a tensor."""
        return tuple(self._made[name].shape if name in self._made else self._slice(name).get_shape())

    def check_shape(self, name: str, layout: TensorLayout) -> None:
        """Raise a ``ValueError`` if the file's shape is not the layout's."""
        shape = self.shape(name)
        if shape != layout.shape:
            raise ValueError(
                f"{name} has the shape {list(shape)} in {self._folder}, the model expects "
                f"{list(layout.shape)}"
            )

    def read(self, name: str, layout: TensorLayout, rank: int, dtype: torch.dtype | None = None) -> Tensor:
        """The shard of ``rank``; only its index ranges are read.

        Raises:
            ValueError: if the file's shape is not the layout's.
        """
        self.check_shape(name, layout)
        source = self.stored(name)
        dtype = dtype or source.dtype
        ranges = [layout.ranges(dimension, rank) for dimension in range(len(layout.shape))]
        if not ranges:
            return source.part(()).to(dtype)
        local = torch.empty(layout.local_shape(rank), dtype=dtype)
        offsets = [_offsets(one) for one in ranges]
        for block in product(*(range(len(one)) for one in ranges)):
            part = source.part(tuple(ranges[d][index] for d, index in enumerate(block)))
            target = local
            for d, index in enumerate(block):
                target = target.narrow(d, offsets[d][index], part.shape[d])
            target.copy_(part)
        return local

    def _slice(self, name: str) -> Any:
        return self._open(self._folder / self._mapping[name]).get_slice(self._in_file(name))

    def _in_file(self, name: str) -> str:
        return self._names_in_files.get(name, name)


def _offsets(ranges: list[tuple[int, int]]) -> list[int]:
    """Where each range begins within the concatenation of all."""
    offsets, position = [], 0
    for low, high in ranges:
        offsets.append(position)
        position += high - low
    return offsets
