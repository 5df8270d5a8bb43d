"""Writing safetensors files piece by piece: no tensor is ever whole in memory.

Format: an 8-byte little-endian length, a JSON header with dtype, shape and byte range of each tensor, then
the tensors' bytes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}


@dataclass(frozen=True)
class TensorSpec:
    """What the file's header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The dtype as safetensors calls it.

        Raises:
            ValueError: if the format has none of it.
        """
        if self.dtype not in _NAMES:
            raise ValueError(
                f"{self.name} is of {self.dtype}, which safetensors cannot store: convert it, or register "
                "the buffer with persistent=False"
            )
        return _NAMES[self.dtype]


class SafetensorsWriter:
    """One file whose tensors are filled in place through :meth:`tensor`. A context manager.

    Args:
        path: the file; deleted again if the context ends with an error.
        specs: the tensors, in file order.
        metadata: strings for the header; ``format: pt`` is what transformers expects.
    """

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._path = path
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._specs = {spec.name: spec for spec in specs}
        self._offsets: dict[str, int] = {}
        position = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": spec.dtype_name,
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.bytes],
            }
            self._offsets[spec.name] = position
            position += spec.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        self._begin = 8 + len(text)
        self._file = path.open("w+b")
        try:
            self._memory = self._map(len(text).to_bytes(8, "little") + text, position)
        except BaseException:
            self._file.close()
            path.unlink(missing_ok=True)
            raise

    def _map(self, header: bytes, bytes_of_tensors: int) -> mmap.mmap:
        self._file.write(header)
        self._file.flush()
        size = len(header) + bytes_of_tensors
        if hasattr(os, "posix_fallocate"):
            # a full disk must be an error here, not a signal when the mapping is written to
            os.posix_fallocate(self._file.fileno(), 0, size)
        self._file.truncate(size)
        return mmap.mmap(self._file.fileno(), size)

    def tensor(self, name: str) -> Tensor:
        """The tensor's place in the file, to be written to: [shape], on the CPU."""
        spec = self._specs[name]
        if not spec.bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        begin = self._begin + self._offsets[name]
        flat = torch.frombuffer(self._memory, dtype=spec.dtype, count=prod(spec.shape), offset=begin)
        return flat.view(spec.shape)

    def finish(self) -> None:
        """Return when the file is on the disk."""
        self._memory.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is not None:
            self._path.unlink(missing_ok=True)
