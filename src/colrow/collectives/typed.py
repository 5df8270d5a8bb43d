"""Differentiable collectives, typed by the placement of a value before and after.

A value on a group of ranks, together with its gradient, is one of (the types of the ``spmd-types`` package):

=====  ===========  ==========================================  ==========================
type   name         value                                       gradient
=====  ===========  ==========================================  ==========================
R      replicated   the same on all ranks                       partial (P): to be summed
I      invariant    the same on all ranks                       the same on all ranks (I)
V      varying      each rank holds its own part                varying (V)
P      partial      the sum over the ranks is the value         replicated (R)
=====  ===========  ==========================================  ==========================

Each collective is an instance of :class:`Collective` that knows its *adjoint*: the collective that carries
the gradient back. Adjoints are collectives of this same table, so second derivatives work as first ones do:

==========================  ==============  =======  ==========================  =======
forward                     types           moves    adjoint                     types
==========================  ==============  =======  ==========================  =======
:class:`Enter`              I → R           nothing  :class:`AllReduce`          P → I
:class:`AllReduce`          P → I           sum      :class:`Enter`              I → R
:class:`AllReduce`          P → R           sum      :class:`AllReduce`          P → R
:class:`AllGather`          V → R           parts    :class:`ReduceScatter`      P → V
:class:`AllGather`          V → I           parts    :class:`Slice`              I → V
:class:`ReduceScatter`      P → V           sum      :class:`AllGather`          V → R
:class:`Slice`              I → V           nothing  :class:`AllGather`          V → I
:class:`Slice`              R → V           nothing  :class:`Pad`                V → P
:class:`Pad`                V → P           nothing  :class:`Slice`              R → V
:class:`FirstRankOnly`      R → P           nothing  :class:`FirstRankOnly`      R → P
:class:`FirstRankOnly`      I → P           nothing  :class:`Assume`             R → I
:class:`AllToAll`           V → V           parts    :class:`AllToAll`           V → V
:class:`Exchange`           V → V           rows     :class:`Exchange`           V → V
==========================  ==============  =======  ==========================  =======
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from colrow.collectives import compiled
from colrow.collectives.communicator import Communicator
from colrow.collectives.pending import Pending

Sizes = tuple[int, ...] | None
"""Extent of a cut dimension on each rank; ``None`` says that all are equal."""


@dataclass(frozen=True)
class Collective(ABC):
    """One row of the table above: how to run it forward, and what carries the gradient back.

    Attributes:
        communicator: the ranks that take part.
        label: names the collective, and its adjoint, in errors and statistics.
    """

    communicator: Communicator
    label: str

    @property
    @abstractmethod
    def types(self) -> tuple[str, str]:
        """Types of the value before and after, such as ``("P", "I")``."""

    @abstractmethod
    def start(self, x: Tensor) -> Pending:
        """Begin on plain values; no autograd. Never writes into ``x``."""

    def run(self, x: Tensor) -> Tensor:
        """The result on plain values; no autograd."""
        return self.start(x).wait()

    @abstractmethod
    def traced(self, x: Tensor) -> Tensor:
        """:meth:`run` in operators that torch.compile can trace."""

    @abstractmethod
    def adjoint(self) -> Collective:
        """The collective that maps the gradient of the result to the gradient of the input."""

    def __call__(self, x: Tensor) -> Tensor:
        """Run on ``x``; differentiable any number of times, under torch.compile once."""
        is_differentiated = x.requires_grad and torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return _Traced.apply(x, self) if is_differentiated else self.traced(x)
        return _Apply.apply(x, self) if is_differentiated else self.run(x)

    def begin(self, x: Tensor) -> PendingResult:
        """Start on ``x`` and return at once; the result, differentiable too, comes from ``wait()``."""
        return PendingResult(self, x)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collective: Collective) -> Tensor:
        ctx.collective = collective
        result = collective.run(x)
        return x.view_as(x) if result is x else result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.collective.adjoint()(gradient), None


class _Attach(torch.autograd.Function):
    """Gives the result of a collective that has already run its place in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor, collective: Collective) -> Tensor:
        ctx.collective = collective
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.collective.adjoint()(gradient), None, None


class _Traced(torch.autograd.Function):
    """What torch.compile traces in place of :class:`_Apply`: both directions become part of its graphs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, collective: Collective) -> Tensor:
        ctx.collective = collective
        result = collective.traced(x)
        # a view of x would lose its gradient formula where a graph returns both (a fault of AOTAutograd)
        may_share = isinstance(collective, LocalCollective) or collective.communicator.size == 1
        return result.clone() if may_share else result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.collective.adjoint().traced(gradient), None


class PendingResult:
    """A differentiable collective under way, from :meth:`Collective.begin`."""

    def __init__(self, collective: Collective, x: Tensor) -> None:
        self._collective = collective
        self._input = x
        if torch.compiler.is_compiling():  # what overlaps with what is the compiler's choice
            self._input = x.detach()
            self._pending = Pending.completed(collective(x))
        else:
            self._pending = collective.start(x.detach())

    def wait(self) -> Tensor:
        """The result, with its place in the autograd graph.

        Raises:
            RankFailure: if another rank died, raised or did not come within the group's timeout.
        """
        result = self._pending.wait()
        if self._input.requires_grad and torch.is_grad_enabled():
            return _Attach.apply(self._input, result, self._collective)
        return result


@dataclass(frozen=True)
class LocalCollective(Collective):
    """One that moves nothing forward. Its result may share memory with its input."""

    @abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """The result on plain values; no autograd."""

    def start(self, x: Tensor) -> Pending:
        return Pending.completed(self.run(x))

    def traced(self, x: Tensor) -> Tensor:
        return self.run(x)


@dataclass(frozen=True)
class Enter(LocalCollective):
    """I → R: the identity; its adjoint sums the partial gradients. Entry of a region."""

    types: ClassVar[tuple[str, str]] = ("I", "R")

    def run(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self) -> Collective:
        return AllReduce(self.communicator, self.label, "I")


@dataclass(frozen=True)
class AllReduce(Collective):
    """P → I or P → R: the sum over the ranks. To I it is the exit of a region."""

    dst: Literal["I", "R"] = "I"

    @property
    def types(self) -> tuple[str, str]:
        return "P", self.dst

    def start(self, x: Tensor) -> Pending:
        return self.communicator.start_all_reduce(x, label=self.label)

    def traced(self, x: Tensor) -> Tensor:
        return compiled.all_reduce(self.communicator, x)

    def adjoint(self) -> Collective:
        return self if self.dst == "R" else Enter(self.communicator, self.label)


@dataclass(frozen=True)
class AllGather(Collective):
    """V → R or V → I: the parts of all ranks, concatenated."""

    dimension: int
    sizes: Sizes = None
    dst: Literal["I", "R"] = "R"

    @property
    def types(self) -> tuple[str, str]:
        return "V", self.dst

    def start(self, x: Tensor) -> Pending:
        return self.communicator.start_all_gather(x, self.dimension, self.sizes, label=self.label)

    def traced(self, x: Tensor) -> Tensor:
        return compiled.all_gather(self.communicator, x, self.dimension, self.sizes)

    def adjoint(self) -> Collective:
        if self.dst == "R":
            return ReduceScatter(self.communicator, self.label, self.dimension, self.sizes)
        return Slice(self.communicator, self.label, self.dimension, self.sizes, "I")


@dataclass(frozen=True)
class ReduceScatter(Collective):
    """P → V: this rank's part of the sum over the ranks."""

    dimension: int
    sizes: Sizes = None
    types: ClassVar[tuple[str, str]] = ("P", "V")

    def start(self, x: Tensor) -> Pending:
        return self.communicator.start_reduce_scatter(x, self.dimension, self.sizes, label=self.label)

    def traced(self, x: Tensor) -> Tensor:
        return compiled.reduce_scatter(self.communicator, x, self.dimension, self.sizes)

    def adjoint(self) -> Collective:
        return AllGather(self.communicator, self.label, self.dimension, self.sizes, "R")


@dataclass(frozen=True)
class Slice(LocalCollective):
    """R → V or I → V: this rank's part of a value that all hold; moves nothing forward."""

    dimension: int
    sizes: Sizes = None
    src: Literal["I", "R"] = "R"

    @property
    def types(self) -> tuple[str, str]:
        return self.src, "V"

    def run(self, x: Tensor) -> Tensor:
        start, sizes = _offset(self, self.sizes, x.shape[self.dimension])
        return x.narrow(self.dimension, start, sizes[self.communicator.rank]).contiguous()

    def adjoint(self) -> Collective:
        if self.src == "I":
            return AllGather(self.communicator, self.label, self.dimension, self.sizes, "I")
        return Pad(self.communicator, self.label, self.dimension, self.sizes)


@dataclass(frozen=True)
class Pad(LocalCollective):
    """V → P: this rank's part in its place, zeros elsewhere; moves nothing forward."""

    dimension: int
    sizes: Sizes = None
    types: ClassVar[tuple[str, str]] = ("V", "P")

    def run(self, x: Tensor) -> Tensor:
        extent = x.shape[self.dimension] * self.communicator.size
        start, sizes = _offset(self, self.sizes, extent)
        shape = list(x.shape)
        shape[self.dimension] = sum(sizes)
        out = x.new_zeros(shape)
        out.narrow(self.dimension, start, sizes[self.communicator.rank]).copy_(x)
        return out

    def adjoint(self) -> Collective:
        return Slice(self.communicator, self.label, self.dimension, self.sizes, "R")


@dataclass(frozen=True)
class FirstRankOnly(LocalCollective):
    """R → P or I → P: the value on the group's first rank, zeros on the others. A bias added once."""

    src: Literal["I", "R"] = "R"

    @property
    def types(self) -> tuple[str, str]:
        return self.src, "P"

    def run(self, x: Tensor) -> Tensor:
        return x if self.communicator.rank == 0 else torch.zeros_like(x)

    def adjoint(self) -> Collective:
        return self if self.src == "R" else Assume(self.communicator, self.label)


@dataclass(frozen=True)
class Assume(LocalCollective):
    """R → I: the identity; of the gradient, equal on all ranks, one rank's counts."""

    types: ClassVar[tuple[str, str]] = ("R", "I")

    def run(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self) -> Collective:
        return FirstRankOnly(self.communicator, self.label, "I")


@dataclass(frozen=True)
class AllToAll(Collective):
    """V → V: cut along one dimension and joined along another."""

    split_dimension: int
    split_sizes: tuple[int, ...]
    concat_dimension: int
    concat_sizes: tuple[int, ...]
    types: ClassVar[tuple[str, str]] = ("V", "V")

    def start(self, x: Tensor) -> Pending:
        return self.communicator.start_all_to_all(
            x,
            self.split_dimension,
            self.split_sizes,
            self.concat_dimension,
            self.concat_sizes,
            label=self.label,
        )

    def traced(self, x: Tensor) -> Tensor:
        return compiled.all_to_all(
            self.communicator,
            x,
            self.split_dimension,
            self.split_sizes,
            self.concat_dimension,
            self.concat_sizes,
        )

    def adjoint(self) -> Collective:
        return AllToAll(
            self.communicator,
            self.label,
            self.concat_dimension,
            self.concat_sizes,
            self.split_dimension,
            self.split_sizes,
        )


@dataclass(frozen=True)
class Exchange(Collective):
    """V → V: each rank's rows to the ranks they are for, as many as there are.

    Attributes:
        given: rows of the value, along dimension 0, for each rank, one rank's after the other's.
        taken: rows from each rank, which come in rank order.
    """

    given: tuple[int, ...]
    taken: tuple[int, ...]
    types: ClassVar[tuple[str, str]] = ("V", "V")

    def start(self, x: Tensor) -> Pending:
        return self.communicator.start_exchange(x, self.given, self.taken, label=self.label)

    def traced(self, x: Tensor) -> Tensor:
        return compiled.exchange(self.communicator, x, self.given, self.taken)

    def adjoint(self) -> Collective:
        return Exchange(self.communicator, self.label, self.taken, self.given)


def _offset(collective: Collective, sizes: Sizes, extent: int) -> tuple[int, tuple[int, ...]]:
    """Where this rank's part begins, and the extents of all parts."""
    ranks = collective.communicator.size
    if sizes is None:
        if extent % ranks:
            raise ValueError(f"{extent} cannot be cut over {ranks} ranks equally: give sizes")
        sizes = (extent // ranks,) * ranks
    elif len(sizes) != ranks:
        raise ValueError(f"got sizes of {len(sizes)} ranks for a group of {ranks}")
    return sum(sizes[: collective.communicator.rank]), sizes
