"""Nestings of arguments, as torch's pytree knows them, at a tenth of its cost where they are plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_LEAVES = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


def leaves(item: Any) -> list[Any]:
    """What ``torch.utils._pytree.tree_leaves`` gives."""
    kind = type(item)
    if kind is tuple or kind is list:
        return [leaf for one in item for leaf in leaves(one)]
    if kind is dict:
        return [leaf for one in item.values() for leaf in leaves(one)]
    return [item] if isinstance(item, _LEAVES) else tree_leaves(item)


def mapped(change: Callable[[Any], Any], item: Any) -> Any:
    """What ``torch.utils._pytree.tree_map`` gives."""
    kind = type(item)
    if kind is tuple:
        return tuple([mapped(change, one) for one in item])
    if kind is list:
        return [mapped(change, one) for one in item]
    if kind is dict:
        return {key: mapped(change, one) for key, one in item.items()}
    return change(item) if isinstance(item, _LEAVES) else tree_map(change, item)
