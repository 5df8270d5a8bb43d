"""The matrix products of a linear layer on one rank, by whichever library is faster on this machine.

On CPUs torch multiplies single precision with MKL where it has it, which on some processors runs at half the
speed of oneDNN at the same accuracy. torch offers oneDNN's product as an operator of its own (that of
``torch.compile``'s CPU backend); it has no gradient formula, so the layers call it inside their own autograd
functions. Half precision goes to oneDNN already, double precision it does not have.

Which one is used is decided once, by trying both: a choice for each shape would differ from run to run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.collectives import Communicator

VARIABLE = "COLROW_GEMM"
Library = Literal["torch", "onednn"]

LADDER = ((8, 64, 64), (32, 128, 256), (64, 256, 512), (512, 512, 1024))
"""Rows, features read and features written of the products that are tried, from small to large."""
MARGIN = 1.15
"""How much faster oneDNN must be to be taken: less may be chance, and runs should not differ by chance."""
TRIES = 12
ROUNDING = 4.0
"""How many times larger the rounding error may be: both sum in another order than the exact product."""


@dataclass(frozen=True)
class Products:
    """Which library multiplies.

    Attributes:
        onednn_from: multiplications from which on a product in single precision goes to oneDNN; ``None``:
            all go to torch.
        reason: why, for people.
    """

    onednn_from: int | None = None
    reason: str = ""

    def uses_onednn(self, rows: int, weight: Tensor) -> bool:
        """Whether the products of a layer with ``weight`` go to oneDNN, for an input of ``rows`` rows."""
        least = self.onednn_from
        return (
            least is not None
            and rows * weight.numel() >= (least or 1)
            and weight.dtype == torch.float32
            and weight.is_cpu
        )

    def __str__(self) -> str:
        library = "torch" if self.onednn_from is None else "oneDNN in single precision"
        return f"matrix products by {library} ({self.reason})"


BY_TORCH = Products()
"""Nothing goes to oneDNN."""


def agreed_products(ranks: Communicator) -> Products:
    """What the group's first rank has chosen, on all of them: parts of one value are computed alike.

    That rank says so, once, on standard error.

    Raises:
        ValueError: as :func:`choose_products`, on every rank.
    """
    mine: Products | ValueError
    try:
        mine = choose_products()
    except ValueError as error:
        mine = error
    # -2: an error, -1: torch
    number = -2 if isinstance(mine, ValueError) else -1 if mine.onednn_from is None else mine.onednn_from
    first = int(ranks.broadcast(torch.tensor([number], dtype=torch.int64), 0, label="matrix products"))
    if isinstance(mine, ValueError):
        raise mine
    if first == -2:
        raise ValueError(
            "the group's first rank could not choose who computes matrix products: see its error"
        )
    if ranks.rank == 0:
        _announce(mine)
    return mine if number == first else Products(None if first < 0 else first, "as the first rank found")


@cache
def _announce(products: Products) -> None:
    print(f"colrow: {products}", file=sys.stderr, flush=True)


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


@cache
def choose_products(forced: str | None = None) -> Products:
    """The faster library on this machine, by trying both, which takes part of a second once.

    Args:
        forced: ``torch``, ``mkl`` (the same) or ``onednn``; default: the variable ``COLROW_GEMM``.

    Raises:
        ValueError: if another library is asked for, or oneDNN's product cannot be used here.
    """
    wanted = forced or os.environ.get(VARIABLE, "")
    if wanted in ("torch", "mkl"):
        return Products(None, f"as {VARIABLE} says")
    fault = _fault()
    if wanted == "onednn":
        if fault:
            raise ValueError(f"{VARIABLE}=onednn cannot be done: {fault}")
        return Products(0, f"as {VARIABLE} says")
    if wanted:
        raise ValueError(f"{VARIABLE} must be onednn, mkl or torch, not {wanted!r}")
    if fault:
        return Products(None, fault)
    return _tried()


def _fault() -> str:
    """Why oneDNN's product cannot be used; empty if it can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    generator = torch.Generator().manual_seed(0)
    rows, read, written = LADDER[1]
    x = torch.randn(rows, read, generator=generator)
    weight, bias = torch.randn(written, read, generator=generator), torch.randn(written, generator=generator)
    exact = F.linear(x.double(), weight.double(), bias.double())
    try:
        found = onednn(x, weight, bias)
        # as gradients are computed: of transposed views
        turned = onednn(exact.float().t(), x.t())
    except (AttributeError, RuntimeError, NotImplementedError) as failed:
        return f"torch {torch.__version__} does not offer oneDNN's product: {str(failed).splitlines()[0]}"
    error = max(_error(found, exact), _error(turned, exact.float().double().t() @ x.double()))
    if error > ROUNDING * max(_error(F.linear(x, weight, bias), exact), 1e-7):
        return "oneDNN's product is less accurate here"
    return ""


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _tried() -> Products:
    """The smallest product from which on oneDNN is faster in all three directions."""
    first: int | None = None
    gain = 0.0
    generator = torch.Generator().manual_seed(0)
    for rows, read, written in reversed(LADDER):
        x, weight, gradient = (
            torch.randn(*size, generator=generator)
            for size in ((rows, read), (written, read), (rows, written))
        )
        theirs = _seconds(lambda: (F.linear(x, weight), gradient @ weight, gradient.t() @ x))  # noqa: B023
        ours = _seconds(
            lambda: (onednn(x, weight), onednn(gradient, weight.t()), onednn(gradient.t(), x.t()))  # noqa: B023
        )
        if ours * MARGIN > theirs:
            break
        first, gain = rows * read * written, max(gain, theirs / ours)
    if first is None:
        return Products(None, "oneDNN is not faster here")
    return Products(first, f"{gain:.1f} times as fast as torch's own here, from {first:,} multiplications on")


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of some tries: other programs only make it longer."""
    # of this thread's own time, where it does all of the work: it has no part in what others take
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    shortest = float("inf")
    for _ in range(TRIES):
        begin = clock()
        work()
        shortest = min(shortest, clock() - begin)
    return shortest
