"""Parameters whose gradient is divided: of sums over several ranks' tokens the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from colrow.apply.replay import Replaying


@contextmanager
def averaged(module: nn.Module, share: float) -> Iterator[None]:
    """In this context the module's code reads its parameters with ``share`` of their gradients.

    What it reads stands in the module's ``__dict__``, where attributes are found before parameters; also in
    what it hands to activation checkpointing, when that is recomputed.
    """
    names = [name for name, one in module._parameters.items() if one is not None and one.requires_grad]
    if not names or not torch.is_grad_enabled():
        yield
        return
    # what it reads may have gone through a collective of tensor parallelism
    values = {name: _Scaled.apply(getattr(module, name), share) for name in names}

    def now() -> Callable[[], AbstractContextManager[object]]:
        return partial(_reading, module, values)

    with _reading(module, values), Replaying(now):
        yield


@contextmanager
def _reading(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    own = vars(module)
    before = {name: own.get(name) for name in values}
    own.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                own.pop(name, None)
            else:
                own[name] = value


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, share: float) -> Tensor:
        ctx.share = share
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.share, None
