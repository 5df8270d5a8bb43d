"""Vocabulary-parallel embedding (Shoeybi et al. 2019, Megatron-LM, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.collectives import AllReduce, Communicator, Group, communicator
from colrow.errors import PlanError
from colrow.layers.linear_functions import entered
from colrow.layers.shards import axis_layout, shard_parameter
from colrow.layout import Cut, DimensionLayout, TensorLayout
from colrow.modules import embedding_fault


def check_range(ids: Tensor, size: int, what: str) -> None:
    """Every id must lie in [0, size): on one rank alone a wrong id would look like another rank's.

    Raises:
        IndexError: at once on the CPU; on a GPU as a device-side assertion, without synchronising. A compiled
            graph asserts too: a ``RuntimeError`` on the CPU.
    """
    if torch.compiler.is_compiling():
        # of no ids, too; their minimum would be an error
        torch._assert_async(((ids >= 0) & (ids < size)).all(), f"{what} must be in [0, {size})")
        return
    if not ids.numel() or ids.is_meta:
        return
    low, high = torch.aminmax(ids)
    if ids.is_cpu:
        least, most = low.item(), high.item()
        if least < 0 or most >= size:
            raise IndexError(f"{what} must be in [0, {size}), got values from {least} to {most}")
    else:
        torch._assert_async(((low >= 0) & (high < size)), f"{what} must be in [0, {size})")


class _Lookup(torch.autograd.Function):
    """Rows that this rank holds, zeros for the others, summed over the ranks in that same memory.

    ``missing`` marks the ids of other ranks, ``without_gradient`` those and the padding id.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        local_ids: Tensor,
        missing: Tensor,
        without_gradient: Tensor,
        ranks: Communicator,
        label: str,
    ) -> Tensor:
        ctx.save_for_backward(local_ids, without_gradient)
        ctx.rows, ctx.ranks, ctx.label = weight.shape[0], ranks, label
        if ctx.rows:
            partial = F.embedding(local_ids, weight).masked_fill_(missing.unsqueeze(-1), 0)
        else:
            partial = weight.new_zeros((*local_ids.shape, weight.shape[1]))
        return ranks.start_all_reduce(partial, label=label, owned=True).wait()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        local_ids, without_gradient = ctx.saved_tensors
        # each rank keeps its own rows
        own = entered(gradient, ctx.ranks, ctx.label).masked_fill(without_gradient.unsqueeze(-1), 0)
        if ctx.rows:
            weight_gradient = torch.ops.aten.embedding_dense_backward(own, local_ids, ctx.rows, -1, False)
        else:
            weight_gradient = own.new_zeros((0, own.shape[-1]))
        return weight_gradient, None, None, None, None, None


class VocabParallelEmbedding(nn.Embedding):
    """An embedding of which each rank holds the rows of some ids; the result is whole on every rank (I).

    The full table is initialised on every rank and then sliced: equally seeded ranks hold, bit for bit, the
    slices of ``nn.Embedding(num_embeddings, embedding_dim)``.

    Args:
        num_embeddings: number of ids over all ranks; any number.
        embedding_dim: length of a row.
        group: process group, mesh or communicator.
        padding_idx: global id whose row gets no gradient.
        cut: ids per rank; default: balanced.
        label: names the layer's collective in errors and statistics.

    Raises:
        ValueError: if the cut does not fit.
    """

    communicator: Communicator
    cut: Cut
    label: str
    scatter: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group: Group,
        *,
        padding_idx: int | None = None,
        cut: Cut | None = None,
        label: str = "vocab-parallel embedding",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._take_shard(group, None, cut, label)

    @staticmethod
    def from_module(
        module: nn.Module,
        group: Group,
        *,
        layout: DimensionLayout | None = None,
        cut: Cut | None = None,
        scatter: Callable[[Tensor], Tensor] | None = None,
        label: str = "vocab-parallel embedding",
    ) -> VocabParallelEmbedding:
        """Make an existing ``nn.Embedding`` vocabulary-parallel, in place; returns it.

        ``scatter`` takes the place of the all-reduce: from partial sums it makes each rank's part of a
        sequence.

        Raises:
            PlanError: if the module is not exactly an ``nn.Embedding`` or uses an option that needs all rows.
        """
        fault = embedding_fault(module)
        if fault:
            raise PlanError(label, fault, "Leave it replicated.")
        module.__class__ = VocabParallelEmbedding
        assert isinstance(module, VocabParallelEmbedding)
        module._take_shard(group, layout, cut, label)
        module.scatter = scatter
        return module

    def _take_shard(self, group: Group, layout: DimensionLayout | None, cut: Cut | None, label: str) -> None:
        self.communicator, self.label = communicator(group), label
        if layout is not None and (len(layout.segments) > 1 or layout.segments[0].outer > 1):
            raise PlanError(label, "the ids of a rank must be consecutive", "Use a contiguous layout.")
        self.vocabulary = self.num_embeddings
        layout, self.cut = axis_layout(self.vocabulary, self.communicator.size, layout, cut)
        rank = self.communicator.rank
        tensor_layout = TensorLayout((self.vocabulary, self.embedding_dim), {0: (layout, self.cut)})
        shard_parameter(self.weight, tensor_layout, rank)
        inner = layout.segments[0].inner
        self._start, self._stop = self.cut.start(rank) * inner, self.cut.stop(rank) * inner
        self.num_embeddings = self._stop - self._start

    def reset_parameters(self) -> None:
        """Initialise, before the table is cut: afterwards each rank would draw the same shard.

        Raises:
            RuntimeError: if the table has been cut.
        """
        if hasattr(self, "communicator"):
            raise RuntimeError(f"{self.label} is cut: initialise a table before it is made parallel")
        super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` [...], integers, equal on all ranks -> [..., embedding_dim], I.

        Raises:
            IndexError: if an id is not in [0, vocabulary); ``RuntimeError`` under torch.compile.
        """
        check_range(ids, self.vocabulary, f"the ids given to {self.label}")
        shifted = ids - self._start
        local_ids = shifted.clamp(0, self._stop - self._start - 1)  # those of other ranks: any row
        missing = local_ids != shifted
        label = f"lookup {self.label}"
        if torch.compiler.is_compiling() or self.scatter is not None:
            partial = self._partial_rows(local_ids, missing)
            return (self.scatter or AllReduce(self.communicator, label))(partial)
        without_gradient = missing if self.padding_idx is None else missing | (ids == self.padding_idx)
        rows: Tensor = _Lookup.apply(
            self.weight, local_ids, missing, without_gradient, self.communicator, label
        )
        return rows

    def _partial_rows(self, local_ids: Tensor, missing: Tensor) -> Tensor:
        """Rows that this rank holds, zeros for the others, in operators that torch.compile can trace."""
        if not self.num_embeddings:
            # the sum of no numbers: zero, with a gradient that is as empty as the table
            return self.weight.new_zeros((*local_ids.shape, self.embedding_dim)) + self.weight.sum()
        padding = None if self.padding_idx is None else self.padding_idx - self._start
        if padding is not None and not 0 <= padding < self.num_embeddings:
            padding = None  # another rank's
        return F.embedding(local_ids, self.weight, padding).masked_fill(missing.unsqueeze(-1), 0)

    def extra_repr(self) -> str:
        position = f"rank {self.communicator.rank} of {self.communicator.size}"
        return f"{super().extra_repr()}, {self.vocabulary} ids cut {list(self.cut.counts)}, {position}"
