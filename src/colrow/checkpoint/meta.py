"""Building a model without its weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made in this context have parameters without memory; their buffers are real.

    Buffers such as rotary frequencies are computed in constructors and stand in no checkpoint, so a model
    built wholly on the meta device would have lost them.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = type(parameter)(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def materialise(tensor: Tensor, value: Tensor, name: str) -> None:
    """Give a parameter or buffer on the meta device memory with ``value`` in it.

    The object stays the same, with its hooks and attributes: an optimizer that holds it trains it.

    Raises:
        ValueError: if something refers to the object's memory, so that this is impossible.
    """
    new = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    hooks, accumulate_hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    try:
        try:
            torch.utils.swap_tensors(tensor, new)
        except RuntimeError:
            # what has been derived or recorded of the model may lie about in cycles that refer to its tensors
            gc.collect()
            torch.utils.swap_tensors(tensor, new)
    except RuntimeError as error:
        raise ValueError(
            f"{name} on the meta device cannot be given memory, because weak references or an earlier "
            f"forward's graph refer to it ({error}). Load the weights before the model is compiled or runs"
        ) from error
    # the attributes went with the memory; hooks are registered there too, so that they are set anew
    tensor.__dict__.update(new.__dict__)
    if hooks is not None:
        tensor._backward_hooks = hooks
    if accumulate_hooks is not None:
        tensor._post_accumulate_grad_hooks = accumulate_hooks
