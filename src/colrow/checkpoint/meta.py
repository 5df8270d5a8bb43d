"""Building a model without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn


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

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def materialise(model: nn.Module, values: dict[int, torch.Tensor]) -> None:
    """Replace parameters by ones that hold ``values``, by identity of the old one; ties stay ties."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in values:
                continue
            key = id(parameter)
            if key not in made:
                made[key] = nn.Parameter(values[key], requires_grad=parameter.requires_grad)
            module._parameters[name] = made[key]
