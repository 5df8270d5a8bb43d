"""Linear layers whose collectives are elsewhere, and who multiplies in all that are cut."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn

from colrow.collectives import Communicator
from colrow.layers.linear import ColumnParallel, RowParallel, change_class
from colrow.layers.linear_functions import local_linear
from colrow.layers.products import Products, agreed_products
from colrow.modules import is_linear


class Local(nn.Module):
    """A linear layer that holds a part of its weight; the collectives that it needs are elsewhere."""

    products: Products
    _out_first: bool

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        weight, bias = cast(Tensor, self.weight), cast("Tensor | None", self.bias)
        return local_linear(x, weight, bias, self._out_first, self.products)


class LocalLinear(Local, nn.Linear):
    """:class:`Local`, for ``nn.Linear``."""


def multiply_faster(model: nn.Module, ranks: Communicator, cut: Collection[nn.Module] = ()) -> None:
    """Let the cut layers of ``model`` multiply by the faster library, where there are two.

    Every rank of the group calls this. See :mod:`colrow.layers.products`.

    Args:
        model: holds the layers.
        ranks: the group.
        cut: modules that hold a part of their weight; plain linear layers among them become :class:`Local`.
    """
    layers = [module for module in model.modules() if isinstance(module, ColumnParallel | RowParallel)]
    plain = [module for module in cut if is_linear(module)]
    weights = [module._parameters["weight"] for module in [*layers, *plain]]
    # weights on meta are read, or made, after the model is cut
    kinds = ("cpu", "meta") if ranks.serves_cpus else ("cpu",)
    if any(one is not None and one.dtype == torch.float32 and one.device.type in kinds for one in weights):
        products = agreed_products(ranks)
        for layer in layers:
            layer.products = products
        for module in plain if products.onednn_from is not None else []:
            change_class(module, Local, LocalLinear, "")
            module._out_first, module.products = isinstance(module, nn.Linear), products  # type: ignore[assignment]
