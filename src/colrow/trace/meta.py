"""Copies of models and arguments on the meta device: shapes without data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colrow.trace.errors import TraceError

_Item = TypeVar("_Item")


class _TensorCopies(TorchFunctionMode):
    """Decides what ``copy.deepcopy`` makes of tensors."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        if function is Tensor.__deepcopy__:
            tensor, memo = arguments
            if id(tensor) not in memo:
                memo[id(tensor)] = self.change(tensor)
            return memo[id(tensor)]
        return function(*arguments, **(keywords or {}))


def copy_with_tensors(item: _Item, change: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> _Item:
    """A deep copy in which each tensor is replaced by ``change(tensor)``, once, wherever it occurs."""
    with _TensorCopies(change):
        return copy.deepcopy(item, memo)


def _on_meta(tensor: Tensor) -> Tensor:
    result = tensor.detach().to("meta")
    if isinstance(tensor, nn.Parameter):
        parameter = nn.Parameter(result, tensor.requires_grad)
        parameter.__dict__.update(tensor.__dict__)
        return parameter
    return result.requires_grad_(tensor.requires_grad)


def is_on_meta(model: nn.Module) -> bool:
    """Whether no parameter of the model holds data."""
    return all(parameter.is_meta for parameter in model.parameters())


def meta_copy(model: nn.Module) -> tuple[nn.Module, dict[int, Tensor]]:
    """A copy of a model on the meta device: ties kept, no data copied, the original untouched.

    Returns:
        The copy, and the original tensors by the ``id`` of their copies.

    Raises:
        TraceError: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    originals: dict[int, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        result = _on_meta(tensor)
        originals[id(result)] = tensor
        return result

    # parameters copy themselves without asking
    for parameter in model.parameters():
        memo[id(parameter)] = change(parameter)
    # nothing is drawn, and generators of random numbers cannot be copied
    for module in model.modules():
        memo.update((id(item), item) for item in vars(module).values() if isinstance(item, torch.Generator))
    try:
        return copy_with_tensors(model, change, memo), originals
    except (TypeError, RuntimeError) as error:
        raise TraceError(
            "",
            type(model).__name__,
            f"the model cannot be copied to the meta device ({error})",
            "Build it there: with torch.device('meta'): model = ...",
        ) from error


def meta_arguments(item: _Item) -> tuple[_Item, dict[int, Tensor]]:
    """A copy of arguments on the meta device, floating-point tensors wanting gradients.

    Returns:
        The copy, and the originals by the ``id`` of their copies.
    """
    originals: dict[int, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        result = tensor.detach().to("meta")
        if result.is_floating_point() or result.is_complex():
            with torch.enable_grad():
                # not a leaf, so that a forward may write into it
                result = result.requires_grad_().clone()
        originals[id(result)] = tensor
        return result

    return copy_with_tensors(item, change, {}), originals
