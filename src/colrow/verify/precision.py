"""One precision throughout: models round to single precision in places, which hides errors and makes others.

Norms, softmax, rotary angles and losses are often computed in float32 whatever the weights are. Two ways of
adding the same numbers then differ by 1e-7, and a mistake of that size passes. With :class:`OnePrecision`
every such conversion is to the precision in which the comparison is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LOWER = {
    torch.float64: frozenset(
        {torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex32}
    ),
    torch.float32: frozenset({torch.bfloat16, torch.float16, torch.complex32}),
}
_NAMED = {
    Tensor.float: torch.float32,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.cfloat: torch.complex64,  # type: ignore[attr-defined]
    Tensor.chalf: torch.complex32,
}
_TYPE_NAMES = {
    "torch.FloatTensor": torch.float32,
    "torch.HalfTensor": torch.float16,
    "torch.BFloat16Tensor": torch.bfloat16,
}


class OnePrecision(TorchFunctionMode):
    """Where a program asks for a lower precision than ``dtype``, it gets ``dtype``.

    Args:
        dtype: float64 or float32.

    Raises:
        ValueError: for any other.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        if dtype not in _LOWER:
            raise ValueError(f"models are compared in torch.float64 or torch.float32, not in {dtype}")
        self.dtype = dtype
        self._lower = _LOWER[dtype]

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if (named := _NAMED.get(function)) in self._lower:
            return args[0].to(precise(named, self.dtype), **keywords)
        if function is Tensor.view:  # of the same bits as another type
            return function(*args, **keywords)
        if any(self._is_lower(one) for one in (*args, *keywords.values())):
            args = tuple(self._precise(one) for one in args)
            keywords = {name: self._precise(one) for name, one in keywords.items()}
        return function(*args, **keywords)

    def _is_lower(self, item: Any) -> bool:
        return self._precise(item) is not item

    def _precise(self, item: Any) -> Any:
        named = _TYPE_NAMES.get(item) if isinstance(item, str) else item
        if isinstance(named, torch.dtype) and named in self._lower:
            return precise(named, self.dtype)
        return item


def precise(given: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or the complex numbers of which both parts are of it where ``given`` is complex."""
    return dtype.to_complex() if given.is_complex else dtype


def is_number(tensor: Tensor) -> bool:
    """Whether a tensor is of floating-point numbers, real or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


@contextmanager
def one_precision(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """A context in which programs compute in ``dtype`` only; new tensors are of that type, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with OnePrecision(dtype):
            yield
    finally:
        torch.set_default_dtype(before)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` with all its floating-point numbers in ``dtype``, in place; complex ones stay complex.

    That includes tensors that a module keeps as plain attributes, which ``model.to`` leaves as they are.
    """

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(precise(tensor.dtype, dtype)) if is_number(tensor) else tensor

    model._apply(converted)  # as model.to does, which would leave the real part of complex numbers only
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, converted(value))
    return model
