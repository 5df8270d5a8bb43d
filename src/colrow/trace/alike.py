"""Whether two modules would do the same with the same arguments."""

from __future__ import annotations

import functools
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (str, bytes, bool, float, complex, type(None), torch.dtype, torch.device, torch.Size, slice)


class ModuleComparison:
    """Compares two modules of one list by everything they hold, except for the data of their tensors.

    Integers that equal the modules' own positions in the list are taken to be their numbers (``layer_idx``)
    and are not compared.
    """

    def __init__(self, position: int, other_position: int) -> None:
        self.position = position
        self.other_position = other_position
        self._entered: set[tuple[int, int]] = set()

    def alike(self, one: Any, other: Any) -> bool:
        """Whether two objects are the same or hold alike things."""
        if one is other:
            return True
        if _is_integer(one) and _is_integer(other):
            return bool(one == other or (one == self.position and other == self.other_position))
        if type(one) is not type(other):
            return False
        if isinstance(one, _PLAIN):
            return bool(one == other)
        if isinstance(one, Tensor):
            return (one.shape, one.dtype, one.requires_grad, one.is_meta) == (
                other.shape,
                other.dtype,
                other.requires_grad,
                other.is_meta,
            )
        pair = (id(one), id(other))
        if pair in self._entered:
            return True
        self._entered.add(pair)
        return self._alike_inside(one, other)

    def _alike_inside(self, one: Any, other: Any) -> bool:
        if isinstance(one, tuple | list):
            return len(one) == len(other) and all(map(self.alike, one, other))
        if isinstance(one, dict):
            return list(one) == list(other) and all(self.alike(one[key], other[key]) for key in one)
        if isinstance(one, set | frozenset):
            return bool(one == other)
        if isinstance(one, FunctionType):
            if one.__code__ is not other.__code__ or one.__globals__ is not other.__globals__:
                return False
            cells = [[cell.cell_contents for cell in each.__closure__ or ()] for each in (one, other)]
            defaults = [(each.__defaults__, each.__kwdefaults__) for each in (one, other)]
            return self.alike(cells[0], cells[1]) and self.alike(defaults[0], defaults[1])
        if isinstance(one, MethodType):
            return one.__func__ is other.__func__ and self.alike(one.__self__, other.__self__)
        if isinstance(one, functools.partial):
            return self.alike([one.func, one.args, one.keywords], [other.func, other.args, other.keywords])
        if isinstance(one, type | ModuleType | BuiltinFunctionType):
            return False
        if isinstance(one, nn.Module) or hasattr(one, "__dict__"):
            return self.alike(vars(one), vars(other))
        return False


def _is_integer(item: Any) -> bool:
    """Traced or not: small ones are not."""
    return isinstance(item, int) and not isinstance(item, bool)


def plain_arguments(item: Any) -> bool:
    """Whether a nesting holds nothing but tensors, numbers and the like: nothing that a call could change
    unseen, such as a key-value cache."""
    if type(item) in (tuple, list):
        return all(plain_arguments(each) for each in item)
    if type(item) is dict:
        return all(plain_arguments(each) for each in item.values())
    return isinstance(item, (Tensor, int, *_PLAIN))
