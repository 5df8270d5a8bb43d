"""Leaving a rank with the parameters of its own stages."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn


def release_parameters(
    model: nn.Module, held: Collection[str], outside: Collection[str], device: torch.device
) -> None:
    """Take from a model all parameters but those that its stages on this rank read; their memory goes.

    Plain tensors are in their place, so that code which asks for their dtype or shape goes on to work: on the
    meta device, or, for those that are read outside of units, of one number in memory, since operators
    outside of units run on every rank.

    Args:
        model: whose modules stay.
        held: first names of the parameters that stay, under all their names.
        outside: first names of those that are read outside of units.
        device: of placeholders.
    """
    first = {id(one): name for name, one in model.named_parameters()}
    gone: list[nn.Parameter] = []
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or first[id(parameter)] in held:
                continue
            blank = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            if first[id(parameter)] in outside:
                blank = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            del module._parameters[leaf]
            vars(module)[leaf] = blank
            gone.append(parameter)
    for parameter in gone:
        if not parameter.is_meta:
            # somebody may refer to the object, as what parallelize has attached does
            parameter.data = parameter.data.new_empty(0)
