"""Examples of a model's inputs: the mode in which each is run, and the same inputs at other sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from colrow.trace import Example
from colrow.trace.tree import map_tensors, tensors_by_path
from colrow.verify.precision import is_number, precise

Examples: TypeAlias = "Mapping[str, Any] | Example | Mapping[str, Example]"
"""Keywords of a model's forward, or an example, or examples by mode."""


def examples_by_mode(model: nn.Module, examples: Examples) -> dict[str, Example]:
    """Examples by mode; of one alone the mode is the one that the model is in.

    Raises:
        ValueError: if there are none.
    """
    alone = "training" if model.training else "evaluation"
    if isinstance(examples, Example):
        return {alone: examples}
    if not examples:
        raise ValueError("give the model's inputs: keywords of its forward, or colrow.trace.Example by mode")
    if all(isinstance(example, Example) for example in examples.values()):
        return dict(examples)
    return {alone: Example(keywords=examples)}


def prepared(example: Example, dtype: torch.dtype, *, differentiable: bool) -> Example:
    """A copy with floating-point tensors in ``dtype``, which want a gradient if ``differentiable``.

    A tensor that is given twice, as queries and as keys, is one tensor in the copy too.
    """
    copies: dict[int, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copied = tensor.detach().clone()
            if is_number(copied):
                copied = copied.to(precise(copied.dtype, dtype)).requires_grad_(differentiable)
            copies[id(tensor)] = copied
        return copies[id(tensor)]

    return _mapped(example, change)


def inputs_with_gradients(example: Example) -> list[tuple[str, Tensor]]:
    """The tensors among the inputs that want a gradient, with their names."""
    everything: dict[Any, Any] = {**dict(enumerate(example.arguments)), **example.keywords}
    return [
        (".".join(map(str, path)), tensor)
        for path, tensor in tensors_by_path(everything)
        if tensor.requires_grad
    ]


def other_sizes(example: Example) -> Iterator[tuple[str, Example]]:
    """The example at other sizes, with a description; what a model accepts must be tried, in this order.

    The batch is dimension 0 of most tensors: it gets one more row. Sequences are dimension 1 of integers and
    booleans, or where there are none, of tensors of three dimensions: they get shorter by a third.
    """
    tensors = [tensor for _, tensor in tensors_by_path([example.arguments, dict(example.keywords)])]
    batches = Counter(tensor.shape[0] for tensor in tensors if tensor.dim())
    if not batches:
        return
    batch = batches.most_common(1)[0][0]
    sequences = [one for one in tensors if one.dim() > 1 and not one.is_floating_point()]
    sequences = sequences or [one for one in tensors if one.dim() == 3]
    lengths = {length: length - max(1, length // 3) for length in (one.shape[1] for one in sequences)}
    lengths.pop(1, None)
    sizes = ", ".join(f"sequence {before} to {after}" for before, after in lengths.items())
    rows = f"batch {batch} to {batch + 1}"
    if lengths:
        yield f"{rows}, {sizes}", _resized(example, batch, batch + 1, lengths)
    yield rows, _resized(example, batch, batch + 1, {})
    if lengths:
        yield sizes, _resized(example, batch, batch, lengths)


def _resized(example: Example, batch: int, rows: int, lengths: Mapping[int, int]) -> Example:
    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() == 1 and tensor.shape[0] != batch:
            return tensor[: lengths.get(tensor.shape[0], tensor.shape[0])]
        if tensor.dim() and tensor.shape[0] == batch:
            tensor = tensor[torch.arange(rows, device=tensor.device) % batch]
        if tensor.dim() > 1:
            tensor = tensor[:, : lengths.get(tensor.shape[1], tensor.shape[1])]
        return tensor

    return _mapped(example, change)


def _mapped(example: Example, change: Any) -> Example:
    arguments, keywords = map_tensors((tuple(example.arguments), dict(example.keywords)), change)
    return Example(arguments, keywords)
