"""Known content: numbers that follow from constants and integer inputs, computed alongside on the CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from colrow.trace.tree import map_leaves, map_tensors, tensors_of

LARGEST = 1 << 20
"""Elements up to which a tensor's content is followed."""

GUESSED_ROWS = 2
"""How many tokens, or experts, a guess takes as chosen."""


def content_of_original(tensor: Tensor) -> Tensor | None:
    """What is known of a given tensor: all of small integer and boolean ones, nothing of others."""
    if tensor.is_meta or tensor.is_floating_point() or tensor.is_complex() or tensor.numel() > LARGEST:
        return None
    return tensor.detach().cpu().clone()


def compute(
    function: torch._ops.OpOverload, arguments: Any, keywords: Any, contents: dict[int, Tensor | None]
) -> Any:
    """The operator's result on the contents of its inputs; None where they are not all known.

    Args:
        contents: content by the ``id`` of the tensors among the arguments.
    """
    if torch.Tag.nondeterministic_seeded in function.tags or any(each is None for each in contents.values()):
        return None

    def on_cpu(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return contents[id(leaf)]
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    try:
        with torch.no_grad():
            return function(*map_leaves(arguments, on_cpu), **map_leaves(keywords, on_cpu))
    except (RuntimeError, IndexError, TypeError, ValueError):
        # an operator without a CPU kernel for these dtypes, or one that fails in the real run too
        return None


def is_small(result: Any) -> bool:
    """Whether all tensors of a result are small enough for their content to be followed."""
    return all(tensor.numel() <= LARGEST for tensor in tensors_of(result))


def reads_data(function: torch._ops.OpOverload) -> bool:
    """Whether the operator's result is a number, or has a shape, that depends on data."""
    tags = function.tags
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def written(function: torch._ops.OpOverload, arguments: Any, keywords: Any) -> list[Tensor]:
    """The tensors that the operator writes into."""
    found: list[Tensor] = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = arguments[position] if position < len(arguments) else keywords.get(argument.name)
            found.extend(tensors_of(given))
    return found


def to_meta(result: Any) -> Any:
    """Tensors with the shapes, strides and dtypes of computed ones, on the meta device."""
    return map_tensors(
        result,
        lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"),
    )


def some_positions(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``positions``, or if there are none those of the first few elements: shape [rows, dimensions].

    A guess that nothing is chosen would leave out whatever is done with what is chosen.
    """
    count = min(GUESSED_ROWS, math.prod(shape))
    if len(positions) or not shape:
        return positions
    return torch.stack(torch.unravel_index(torch.arange(count), shape), 1)
