"""Linear layers whose collectives are elsewhere, and who multiplies in all."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn

from colrow.collectives import Communicator
from colrow.layers.faster import Size, agreed_products
from colrow.layers.linear import ColumnParallel, RowParallel, change_class
from colrow.layers.linear_functions import local_linear
from colrow.layers.products import BY_TORCH, Products
from colrow.modules import is_linear


class Local(nn.Module):
    """A linear layer that holds a part of its weight; the collectives that it needs are elsewhere."""

    products: Products
    _out_first: bool

    def _become_local(self, products: Products) -> None:
        self._out_first, self.products = isinstance(self, nn.Linear), products

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        weight, bias = cast(Tensor, self.weight), cast("Tensor | None", self.bias)
        return local_linear(x, weight, bias, self._out_first, self.products)


class LocalLinear(Local, nn.Linear):
    """:class:`Local`, for ``nn.Linear``."""


def make_local(module: nn.Module, products: Products = BY_TORCH) -> None:
    """Make a plain linear layer one of colrow's, in place: :class:`Local`."""
    change_class(module, Local, LocalLinear, "")
    assert isinstance(module, Local)
    module._become_local(products)


def multiply_faster(model: nn.Module, ranks: Communicator) -> None:
    """Let the linear layers of ``model``, cut or whole, multiply by the faster library, where there are two.

    Every rank of the group calls this. See :mod:`colrow.layers.faster`.

    Args:
        model: holds the layers; plain linear ones become :class:`Local` if another library than torch's own
            choice is faster for them.
        ranks: the group.
    """
    # weights on meta are read, or made, after the model is cut
    kinds = ("cpu", "meta") if ranks.serves_cpus else ("cpu",)
    layers = [module for module in model.modules() if _multiplies(module, kinds)]
    if not layers:
        return
    for layer, products in zip(
        layers, agreed_products(ranks, [_size(layer) for layer in layers]), strict=True
    ):
        if isinstance(layer, ColumnParallel | RowParallel):
            layer.products = products
        elif products.rows_from is not None:
            make_local(layer, products)


def _multiplies(module: nn.Module, kinds: Collection[str]) -> bool:
    """Whether this is a linear layer in single precision on a device of one of these kinds."""
    if not isinstance(module, ColumnParallel | RowParallel) and not is_linear(module):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dtype == torch.float32 and weight.device.type in kinds


def _size(layer: nn.Module) -> Size:
    """The features that a layer reads and writes on this rank."""
    written, read = cast(Tensor, layer.weight).shape[:: 1 if isinstance(layer, nn.Linear) else -1]
    return read, written
