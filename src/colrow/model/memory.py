"""Running unknown models without using up a machine's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST = 1 << 27
"""Numbers in a tensor: half a gigabyte in single precision."""
HARMLESS = 1 << 13
"""From so many numbers nothing too large is made."""


class TooLargeError(RuntimeError):
    """An operator would make a tensor of more numbers than :data:`LARGEST`."""


class LimitedTensors(TorchDispatchMode):
    """In this context an operator whose result would be too large raises, before it takes the memory.

    How large is found out on the meta device. A detector that finds a thousand things in random pixels, or a
    shape that was guessed wrong, may ask for a hundred gigabytes.

    Raises:
        TooLargeError: names the operator and the shape.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        tensors = [one for one in pytree.tree_leaves((arguments, keywords)) if isinstance(one, Tensor)]
        if sum(one.numel() for one in tensors) > HARMLESS:
            self._check(function, arguments, keywords)
        return function(*arguments, **keywords)

    def _check(self, function: Callable[..., Any], arguments: Any, keywords: Any) -> None:
        try:
            given = pytree.tree_map_only(Tensor, lambda one: one.to("meta"), (arguments, keywords))
            results = pytree.tree_leaves(function(*given[0], **given[1]))
        except Exception:
            return  # what depends on data, or has no shape on meta, is left to run
        for one in results:
            if isinstance(one, Tensor) and one.numel() > LARGEST:
                raise TooLargeError(f"{function} would make a tensor of shape {list(one.shape)}")
