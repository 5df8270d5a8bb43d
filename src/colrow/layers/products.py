"""The matrix products of a linear layer on one rank: by torch's own operators, or by oneDNN.

On CPUs torch multiplies single precision with MKL where it has it, which on some processors runs at half the
speed of oneDNN at the same accuracy. torch offers oneDNN's product as an operator of its own (that of
``torch.compile``'s CPU backend); it has no gradient formula, so the layers call it inside their own autograd
functions. Half precision goes to oneDNN already, double precision it does not have.

Who is faster is found by trying: :mod:`colrow.layers.faster`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Products:
    """Which library multiplies in a linear layer, by the rows (tokens) of its input.

    Attributes:
        forward_from: from so many rows on the product in single precision goes to oneDNN; ``None``: never.
        backward_from: likewise the two products of the gradients.
    """

    forward_from: int | None = None
    backward_from: int | None = None

    @property
    def rows_from(self) -> int | None:
        """From so many rows on anything goes to oneDNN; ``None``: never."""
        if self.forward_from is None or self.backward_from is None:
            return self.backward_from if self.forward_from is None else self.forward_from
        return min(self.forward_from, self.backward_from)


BY_TORCH = Products()
"""Nothing goes to oneDNN."""


def goes_to_onednn(rows_from: int | None, x: Tensor, weight: Tensor) -> bool:
    """Whether a product with ``weight``, or its gradient's, goes to oneDNN.

    Args:
        rows_from: from so many rows of ``x`` on, as :class:`Products` says.
        x: the input, or the gradient of the result: [..., features].
    """
    if rows_from is None or x.dtype != torch.float32 or weight.dtype != torch.float32 or not weight.is_cpu:
        return False
    numbers = x.numel()
    return numbers > 0 and weight.numel() > 0 and numbers >= rows_from * x.shape[-1]


def onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right.T + bias``: [..., n], [m, n], [m] -> [..., m]; single precision, no autograd."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return result


# for torch.compile, which takes torch's own operator only with weights that do not change
_library = torch.library.Library("colrow", "DEF")
_library.define("onednn(Tensor left, Tensor right, Tensor? bias=None) -> Tensor")
_library.impl("onednn", onednn, "CPU")
torch.library.register_fake(
    "colrow::onednn",
    lambda left, right, bias=None: left.new_empty((*left.shape[:-1], right.shape[0])),
    lib=_library,
)


def compiled_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`onednn` as one operator in a graph of ``torch.compile``."""
    result: Tensor = torch.ops.colrow.onednn(left, right, bias)
    return result
