"""Column-parallel and row-parallel linear layers (Shoeybi et al. 2019, Megatron-LM, section 3).

A column-parallel linear holds some of the output features, a row-parallel one some of the input features.
One after the other they need one all-reduce forward (the sum of the row-parallel layer's partial results)
and one backward (the sum of the gradients of what the column-parallel layer reads).

Written once for ``nn.Linear``, whose weight is ``[out, in]``, and transformers' ``Conv1D``, ``[in, out]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from colrow.collectives import (
    AllGather,
    AllReduce,
    Communicator,
    Group,
    ReduceScatter,
    Slice,
    communicator,
)
from colrow.collectives.statistics import current_phase
from colrow.errors import PlanError
from colrow.layers.entry import LayerEntry
from colrow.layers.linear_functions import (
    ColumnWeights,
    RowLinear,
    RowProduct,
    RowScatter,
    autocast,
    column_linear,
    local_linear,
)
from colrow.layers.products import Products
from colrow.layers.shards import axis_layout, shard_parameter
from colrow.layout import Cut, DimensionLayout, TensorLayout
from colrow.modules import is_linear
from colrow.randomness import RegionRandomness


class _ParallelLinear(nn.Module):
    """What the two kinds share: the group, the layout of the cut features, the parameters' shards."""

    communicator: Communicator
    label: str
    features: DimensionLayout
    cut: Cut
    region: RegionRandomness | None
    _reduction: str
    products: Products = Products()
    _region_name = ""

    def _take_shard(
        self, group: Group, label: str, layout: DimensionLayout | None, cut: Cut | None, output: bool
    ) -> None:
        """Keep this rank's part of the output features, or of the input features, in place."""
        ranks = self.communicator = communicator(group)
        self.label, self.region = label, None
        self._reduction = f"{'enter' if output else 'exit'} {label}"
        self._out_first = isinstance(self, nn.Linear)
        names = ("out_features", "in_features") if self._out_first else ("nf", "nx")
        axis = 0 if output else 1
        # a weight that is tied may be a shard already, or have another size than the layer was made with
        sizes = list(self.operands[0].shape)[:: 1 if self._out_first else -1]
        sizes[axis] = getattr(self, names[axis]) if layout is None else layout.size
        self.features, self.cut = axis_layout(sizes[axis], ranks.size, layout, cut)
        placed = (self.features, self.cut)
        dimension = axis if self._out_first else 1 - axis
        shape = tuple(sizes) if self._out_first else tuple(reversed(sizes))
        shard_parameter(self._parameters["weight"], TensorLayout(shape, {dimension: placed}), ranks.rank)
        if output:
            shard_parameter(self._parameters["bias"], TensorLayout((sizes[0],), {0: placed}), ranks.rank)
        setattr(self, names[axis], self.features.local_size(self.cut, ranks.rank))

    def reset_parameters(self) -> None:
        """Initialise, before the layer is cut: afterwards each rank would draw the same shard.

        Raises:
            RuntimeError: if the layer has been cut.
        """
        if hasattr(self, "communicator"):
            raise RuntimeError(f"{self.label} is cut: initialise a layer before it is made parallel")
        super().reset_parameters()  # type: ignore[misc]

    @property
    def operands(self) -> tuple[Tensor, Tensor | None]:
        """This rank's weight and bias."""
        return cast(Tensor, self.weight), cast("Tensor | None", self.bias)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of cut features on each rank."""
        return tuple(self.features.local_size(self.cut, rank) for rank in range(self.cut.ranks))

    def extra_repr(self) -> str:
        whole = f"{self.features.size} features cut {list(self.sizes)}"
        position = f"rank {self.communicator.rank} of {self.communicator.size}"
        return f"{super().extra_repr()}, {whole}, {position}".lstrip(", ")


class ColumnParallel(_ParallelLinear):
    """What makes a linear layer column-parallel, whichever way its weight lies."""

    entry: LayerEntry | None
    reads: Literal["I", "R"]
    gather_output: bool
    instead: Callable[[ColumnParallel, Tensor], Tensor | None] | None = None
    """Gives a result in place of the product's, or ``None``; of the input as it has been entered."""
    _number: int | None = None

    def _become_column(
        self,
        group: Group,
        label: str,
        layout: DimensionLayout | None,
        cut: Cut | None,
        entry: LayerEntry | None,
        reads: Literal["I", "R"],
        gather_output: bool,
    ) -> None:
        if gather_output and layout is not None and len(layout.segments) > 1:
            raise ValueError("the shards of a packed layout are not consecutive: they cannot be gathered")
        self._take_shard(group, label, layout, cut, output=True)
        self.entry, self.reads, self.gather_output = entry, reads, gather_output
        self._number = None if entry is None else entry.join(self)

    @property
    def is_entered(self) -> bool:
        """Whether the gradient of the input is reduced elsewhere than in the product."""
        return self.entry is not None or self.reads == "R"

    @property
    def weights(self) -> ColumnWeights:
        """How the layer multiplies."""
        return ColumnWeights(
            self.communicator, self._reduction, self._out_first, self.products, self.is_entered
        )

    def begin_region(self, region: RegionRandomness, name: str) -> None:
        """From this layer's output on, random numbers differ by rank, until the region ``name`` ends."""
        self.region, self._region_name = region, name

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in features], I (or R) -> [..., this rank's out features], V, or all of them, I."""
        entry, y = self.entry, None
        if self.instead is not None and not torch.compiler.is_compiling():
            x, entry = x if entry is None else entry(x), None
            found = self.instead(self, x)
            if found is not None:
                return found
        if entry is not None and self._number is not None:
            y = entry.product(self._number, x)
        if y is None:
            y = column_linear(
                x if entry is None else entry(x),
                *self.operands,
                self.communicator,
                self._reduction,
                self._out_first,
                self.products,
                self.is_entered,
            )
        if self.region is not None:
            self.region.enter(y.device, self._region_name)
        if self.gather_output:
            label = f"gather {self.label}"
            y = AllGather(self.communicator, label, y.dim() - 1, self.sizes, "I")(y)
        return y


class Scatter(Protocol):
    """What takes the place of an all-reduce: from partial sums it makes each rank's part of a sequence."""

    def collective(self, value: Tensor) -> AllReduce | ReduceScatter:
        """What is done to the partial sums of ``value``'s shape, but for the last dimension."""

    def __call__(self, value: Tensor) -> Tensor:
        """Do it to ``value``."""


class RowParallel(_ParallelLinear):
    """What makes a linear layer row-parallel, whichever way its weight lies."""

    reads: Literal["V", "I"]
    scatter: Scatter | None

    def _become_row(
        self,
        group: Group,
        label: str,
        layout: DimensionLayout | None,
        cut: Cut | None,
        reads: Literal["V", "I"],
        scatter: Scatter | None = None,
    ) -> None:
        self._take_shard(group, label, layout, cut, output=False)
        if reads == "I" and len(self.features.segments) > 1:
            raise ValueError("a row-parallel layer can slice its input only along consecutive features")
        self.reads, self.scatter = reads, scatter

    def end_region(self, region: RegionRandomness, name: str) -> None:
        """From this layer's output on, random numbers agree on all ranks."""
        self.region, self._region_name = region, name

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., this rank's in features], V (or all of them, I) -> [..., out features], I.

        With ``scatter`` the result is what that makes of the partial sums, with the bias added.
        """
        if self.region is not None:
            self.region.leave(self._region_name)
        if self.reads == "I":
            x = Slice(self.communicator, f"slice {self.label}", x.dim() - 1, self.sizes, "I")(x)
        label = self._reduction
        if self.scatter is not None and self.communicator.overlaps and not _is_recomputed():
            scatter = self.scatter.collective(x)
            if isinstance(scatter, ReduceScatter):
                *factors, bias = autocast(x, *self.operands)
                total = RowScatter.apply(*factors, scatter, self._out_first, self.products)
                return total if bias is None else total + bias
        if torch.compiler.is_compiling() or self.scatter is not None:
            weight, bias = self.operands
            total = (self.scatter or AllReduce(self.communicator, label))(
                local_linear(x, weight, None, self._out_first, self.products)
            )
            return total if bias is None else total + bias.to(total.dtype)
        operands = autocast(x, *self.operands)
        if _is_recomputed():
            *factors, bias = operands
            partial = RowProduct.apply(*factors, self._out_first, self.products)
            total = AllReduce(self.communicator, label)(partial)
            return total if bias is None else total + bias
        result: Tensor = RowLinear.apply(*operands, self.communicator, label, self._out_first, self.products)
        return result


def _is_recomputed() -> bool:
    """Whether a forward is one of a graph, recomputed, or watched.

    What keeps the results of some operators and recomputes the others asks for the same operators again, and
    what it keeps must not be reduced in place.
    """
    if torch.compiler.is_compiling():
        return True
    return current_phase() == "backward" or torch._C._len_torch_dispatch_stack() > 0


class ColumnParallelLinear(ColumnParallel, nn.Linear):
    """A linear layer of which each rank holds some output features.

    The full weight is initialised on every rank and then sliced, so that ranks with equally seeded
    generators hold, bit for bit, the slices of ``nn.Linear(in_features, out_features)``.

    Args:
        in_features: size of the input, whole on every rank.
        out_features: size of the output over all ranks; any number.
        group: process group, mesh or communicator.
        bias: whether to add a bias, cut like the output.
        layout: how units lie in the output features; default: each feature is a unit.
        cut: units per rank; default: balanced.
        reads: ``"I"``: the layer enters its input (all-reduce of the gradient, overlapped with the weight's
            gradient); ``"R"``: the caller has done so.
        gather_output: give all features (I) instead of this rank's (V).
        label: names the layer's collectives in errors and statistics.

    Raises:
        ValueError: if layout, cut and group do not fit each other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group,
        *,
        bias: bool = True,
        layout: DimensionLayout | None = None,
        cut: Cut | None = None,
        reads: Literal["I", "R"] = "I",
        gather_output: bool = False,
        label: str = "column-parallel linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._become_column(group, label, layout, cut, None, reads, gather_output)


class RowParallelLinear(RowParallel, nn.Linear):
    """A linear layer of which each rank holds some input features; the bias is added once, after the sum.

    Args:
        in_features: size of the input over all ranks; any number.
        out_features: size of the output, whole on every rank.
        group: process group, mesh or communicator.
        bias: whether to add a bias, replicated.
        layout: how units lie in the input features; default: each feature is a unit.
        cut: units per rank; default: balanced.
        reads: ``"V"``: each rank gives its features; ``"I"``: all ranks give all features.
        label: names the layer's collectives in errors and statistics.

    Raises:
        ValueError: if layout, cut and group do not fit each other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group,
        *,
        bias: bool = True,
        layout: DimensionLayout | None = None,
        cut: Cut | None = None,
        reads: Literal["V", "I"] = "V",
        label: str = "row-parallel linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._become_row(group, label, layout, cut, reads)


@cache
def _conv1d_class(base: type[nn.Module], role: type[nn.Module]) -> type[nn.Module]:
    return type(role.__name__ + base.__name__, (role, base), {"__module__": __name__})


def change_class(module: nn.Module, role: type[nn.Module], linear: type[nn.Module], label: str) -> None:
    if not is_linear(module):
        raise PlanError(
            label,
            f"{type(module).__name__} is not a plain linear layer, so its forward is not known",
            "Cut nn.Linear or Conv1D modules, or leave this one replicated.",
        )
    module.__class__ = linear if isinstance(module, nn.Linear) else _conv1d_class(type(module), role)  # type: ignore[arg-type]


def column_parallel(
    module: nn.Module,
    group: Group,
    *,
    layout: DimensionLayout | None = None,
    cut: Cut | None = None,
    entry: LayerEntry | None = None,
    reads: Literal["I", "R"] = "I",
    gather_output: bool = False,
    label: str = "column-parallel linear",
) -> ColumnParallel:
    """Make an existing ``nn.Linear`` or ``Conv1D`` column-parallel, in place; returns it.

    The module and its parameters stay the same objects. ``entry`` is shared by layers that read one value;
    the other arguments are those of :class:`ColumnParallelLinear`.

    Raises:
        PlanError: if the module is neither.
    """
    change_class(module, ColumnParallel, ColumnParallelLinear, label)
    assert isinstance(module, ColumnParallel)
    module._become_column(group, label, layout, cut, entry, reads, gather_output)
    return module


def row_parallel(
    module: nn.Module,
    group: Group,
    *,
    layout: DimensionLayout | None = None,
    cut: Cut | None = None,
    reads: Literal["V", "I"] = "V",
    scatter: Scatter | None = None,
    label: str = "row-parallel linear",
) -> RowParallel:
    """Make an existing ``nn.Linear`` or ``Conv1D`` row-parallel, in place; returns it.

    ``scatter`` takes the place of the all-reduce: from partial sums it makes each rank's part of a sequence.
    The other arguments are those of :class:`RowParallelLinear`.

    Raises:
        PlanError: if the module is neither.
    """
    change_class(module, RowParallel, RowParallelLinear, label)
    assert isinstance(module, RowParallel)
    module._become_row(group, label, layout, cut, reads, scatter)
    return module
