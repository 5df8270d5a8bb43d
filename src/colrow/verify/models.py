"""The two models that are compared: built alike, with parameters that hide nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from colrow.verify.chance import seed_everything
from colrow.verify.precision import cast, is_number, precise

SPREAD = 0.1
"""Standard deviation of what is added to biases and norms."""


def build_pair(
    model: nn.Module | Callable[[], nn.Module], dtype: torch.dtype, seed: int
) -> tuple[nn.Module, nn.Module]:
    """Two equal models in ``dtype``, the same on every rank.

    Args:
        model: copied, if it is a module; a function is called twice, after seeding.
        dtype: of all parameters and buffers.
        seed: of the generators while building and of what is added to biases and norms.
    """
    pair = []
    for _ in range(2):
        seed_everything(seed)
        one = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        spread(cast(one, dtype), seed)
        pair.append(one)
    return pair[0], pair[1]


def spread(model: nn.Module, seed: int) -> None:
    """Move biases, norm weights and whatever else begins with equal numbers away from them, in place.

    A bias of zeros that is added twice does not show, and a norm's weight of ones that is cut wrongly does
    not either. Positive numbers stay positive: they may be variances.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in _uniform(model):
            dtype = precise(tensor.dtype, torch.float64)
            noise = torch.randn(tensor.shape, generator=generator, dtype=dtype).to(tensor)
            if not tensor.is_complex() and (tensor > 0).all():
                tensor.mul_((SPREAD * noise).exp())
            else:
                tensor.add_(SPREAD * noise)


def _uniform(model: nn.Module) -> Iterator[Tensor]:
    """Parameters of at most one dimension or of equal numbers, and vectors of equal numbers in buffers."""
    for parameter in model.parameters():
        if is_number(parameter) and (parameter.dim() < 2 or _is_constant(parameter)):
            yield parameter
    for buffer in model.buffers():
        if is_number(buffer) and buffer.dim() == 1 and buffer.numel() > 1 and _is_constant(buffer):
            yield buffer


def _is_constant(tensor: Tensor) -> bool:
    if not tensor.numel():
        return False
    first = tensor.flatten()[:64]
    # nearly all are not, which the first elements tell
    return bool((first == first[0]).all() and (tensor == first[0]).all() and tensor.isfinite().all())
