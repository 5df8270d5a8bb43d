"""Which library multiplies faster on this machine, found by trying both at the sizes of a model's layers.

Tried are the product, and those of both gradients, of each layer's own weight with few, some and many rows.
The group's first rank decides for all: parts of one value are computed alike.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from colrow.collectives import Communicator
from colrow.layers.products import BY_TORCH, Products, onednn

VARIABLE = "COLROW_GEMM"

Size = tuple[int, int]
"""Features that a layer reads and that it writes."""

ROWS = (8, 64, 512)
"""Rows of the products that are tried, from few to many; from where oneDNN is faster, it stays so."""
WIDEST = 1024
"""Features of the products that are tried, at most: wider ones take longer, by the same factor for both."""
SIZES = 8
"""How many sizes are tried, at most; layers of others do as the one that is nearest."""
MARGIN = 1.15
"""How much faster oneDNN must be to be taken: less may be chance, and runs should not differ by chance."""
SECONDS = 0.01
"""How long each is tried, or a few times if that takes longer."""
ROUNDING = 4.0
"""How many times larger the rounding error may be: both sum in another order than the exact product."""


def agreed_products(ranks: Communicator, sizes: Sequence[Size]) -> list[Products]:
    """What the group's first rank has chosen for each of several layers, on all ranks.

    Rank 0 of the job says so, once, on standard error.

    Args:
        ranks: the group.
        sizes: of each layer's weight on this rank; as many on every rank.

    Raises:
        ValueError: as :func:`choose_products`, on every rank.
    """
    mine: list[Products] | ValueError = [BY_TORCH] * len(sizes)
    reason = ""
    if ranks.rank == 0:
        try:
            mine, reason = choose_products(sizes)
        except ValueError as error:
            mine = error
    numbers = torch.full((len(sizes), 2), _ERROR, dtype=torch.int64)
    if not isinstance(mine, ValueError):
        for row, one in zip(numbers, mine, strict=True):
            row[0], row[1] = (_NEVER if least is None else least for least in _rows_from(one))
    of_first = ranks.broadcast(numbers, 0, label="matrix products")
    if isinstance(mine, ValueError):
        raise mine
    if bool((of_first == _ERROR).any()):
        raise ValueError(
            "the group's first rank could not choose who computes matrix products: see its error"
        )
    if reason and (not dist.is_initialized() or dist.get_rank() == 0):
        _announce(reason)
    return [Products(*(None if one == _NEVER else one for one in row)) for row in of_first.tolist()]


_NEVER, _ERROR = -1, -2


def _rows_from(products: Products) -> tuple[int | None, int | None]:
    return products.forward_from, products.backward_from


@cache
def _announce(reason: str) -> None:
    print(f"colrow: matrix products by {reason}", file=sys.stderr, flush=True)


def choose_products(sizes: Sequence[Size], forced: str | None = None) -> tuple[list[Products], str]:
    """The faster library on this machine for each of several layers, and why, for people.

    Trying takes a tenth of a second for each size that was not tried before.

    Args:
        sizes: of each layer's weight.
        forced: ``torch``, ``mkl`` (the same) or ``onednn``; default: the variable ``COLROW_GEMM``.

    Raises:
        ValueError: if another library is asked for, or oneDNN's product cannot be used here.
    """
    wanted = forced or os.environ.get(VARIABLE, "")
    if wanted not in ("", "torch", "mkl", "onednn"):
        raise ValueError(f"{VARIABLE} must be onednn, mkl or torch, not {wanted!r}")
    if wanted in ("torch", "mkl"):
        return [BY_TORCH] * len(sizes), f"torch (as {VARIABLE} says)"
    fault = fault_of_onednn()
    if wanted == "onednn":
        if fault:
            raise ValueError(f"{VARIABLE}=onednn cannot be done: {fault}")
        return [Products(1, 1)] * len(sizes), f"oneDNN in single precision (as {VARIABLE} says)"
    if fault:
        return [BY_TORCH] * len(sizes), f"torch ({fault})"
    return _tried([(min(read, WIDEST), min(written, WIDEST)) for read, written in sizes])


def _tried(sizes: Sequence[Size]) -> tuple[list[Products], str]:
    by_numbers = sorted({size for size in sizes if min(size) > 0}, key=lambda size: (math.prod(size), size))
    results = {size: _try(size) for size in by_numbers[-SIZES:]}
    if not results:
        return [BY_TORCH] * len(sizes), "torch (there is nothing to multiply)"
    found = [results[_nearest(size, results)][0] for size in sizes]
    gains = [gain for products, gain in results.values() if products.rows_from is not None]
    if not gains:
        return found, "torch (oneDNN is not faster here)"
    number = f"all {len(results)}" if len(gains) == len(results) else f"{len(gains)} of {len(results)}"
    return found, (
        f"oneDNN in single precision (up to {max(gains):.1f} times as fast as torch's own here, "
        f"for {number} sizes of weights)"
    )


def _nearest(size: Size, tried: Collection[Size]) -> Size:
    """The one of ``tried`` whose weight has most nearly as many numbers."""
    return size if size in tried else min(tried, key=lambda one: abs(math.prod(one) - math.prod(size)))


@cache
def fault_of_onednn() -> str:
    """Why oneDNN's product cannot be used; empty if it can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    generator = torch.Generator().manual_seed(0)
    rows, read, written = 32, 128, 256
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


@cache
def _try(size: Size) -> tuple[Products, float]:
    """From how many rows on oneDNN is faster for a weight, and how many times at the most."""
    found: list[int | None] = []
    most = 1.0
    for gradients in (False, True):
        gains = ((rows, _gain(size, rows, gradients)) for rows in ROWS)
        rows, gain = next(((rows, gain) for rows, gain in gains if gain >= MARGIN), (None, 1.0))
        found.append(rows)
        most = max(most, gain)
    return Products(*found), most


def _gain(size: Size, rows: int, gradients: bool) -> float:
    """How many times as fast oneDNN is, in the product of so many rows or in both of its gradients'."""
    read, written = size
    generator = torch.Generator().manual_seed(0)
    x, weight, of_y = (
        torch.randn(*shape, generator=generator) for shape in ((rows, read), (written, read), (rows, written))
    )

    def seconds(multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
        if gradients:
            return _seconds(lambda: (multiply(of_y, weight.t()), multiply(of_y.t(), x.t())))
        return _seconds(lambda: multiply(x, weight))

    return seconds(F.linear) / seconds(onednn)


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of some tries: other programs only make it longer."""
    # of this thread's own time, where it does all of the work: it has no part in what others take
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < SECONDS:
        begin = clock()
        work()
        taken.append(max(clock() - begin, 1e-9))
    return min(taken)
