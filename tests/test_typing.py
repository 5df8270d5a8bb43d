"""Collectives and layers pass the ``spmd-types`` checker, and misuse does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import spmd_types as spmd
import spmd_types.checker
import torch
from spmd_types import I, P, R, S, SpmdTypeError, V
from torch import Tensor
from torch.nn import functional as F

from colrow import collectives
from colrow.collectives import communicator
from colrow.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, cross_entropy
from colrow.layers.entry import SharedEntry
from colrow.layout import Cut
from tests import typing_rules
from tests.pool import Pool, worker_mesh


def _collectives(size: int) -> None:
    typing_rules.register()
    mesh = worker_mesh(size)
    tp = mesh.get_group("tp")
    sizes = list(Cut.balanced(7, size).counts)
    own = sizes[communicator(mesh).rank]

    def leaf(*shape: int, kind: object) -> Tensor:
        value = torch.randn(shape, requires_grad=True)
        spmd.assert_type(value, {tp: kind})
        return value

    with spmd.set_current_mesh(mesh["tp"]), spmd.checker.typecheck(local=False):
        x = leaf(3, 7, kind=I)
        entered = collectives.enter(x, mesh)
        spmd.assert_type(entered, {tp: R})
        partial = leaf(3, 7, kind=P)
        spmd.assert_type(collectives.all_reduce(partial, mesh), {tp: I})
        spmd.assert_type(collectives.all_reduce(partial, mesh, dst="R"), {tp: R})
        with spmd.no_typecheck():  # the transport's work on plain values
            pending = collectives.all_reduce_async(partial, mesh)
            pending._pending.wait()
        spmd.assert_type(pending.wait(), {tp: I})
        spmd.assert_type(collectives.reduce_scatter(partial, mesh, 1, sizes=sizes), {tp: S(1)})
        shard = leaf(3, own, kind=S(1))
        spmd.assert_type(collectives.all_gather(shard, mesh, 1, sizes=sizes), {tp: R})
        spmd.assert_type(collectives.all_gather(shard, mesh, 1, sizes=sizes, dst="I"), {tp: I})
        spmd.assert_type(collectives.slice_local(entered, mesh, 1, sizes=sizes), {tp: S(1)})
        spmd.assert_type(collectives.slice_local(x, mesh, 1, sizes=sizes, src="I"), {tp: S(1)})
        spmd.assert_type(collectives.first_rank_only(x, mesh), {tp: P})
        turned = collectives.all_to_all(
            leaf(own, 7, kind=S(0)), mesh, 1, 0, split_sizes=sizes, concat_sizes=sizes
        )
        spmd.assert_type(turned, {tp: S(1)})
        # misuse: an exit of what is no partial sum, an entry of what is entered, a sum of shards
        with pytest.raises(SpmdTypeError):
            collectives.all_reduce(x, mesh)
        with pytest.raises(SpmdTypeError):
            collectives.enter(entered, mesh)
        with pytest.raises(SpmdTypeError):
            collectives.all_reduce(leaf(3, 2, kind=S(1)), mesh)
        # a partial sum plus a replicated bias counts the bias on every rank
        with pytest.raises(SpmdTypeError):
            partial + entered


@pytest.mark.parametrize("size", [2, 3])
def test_collectives_are_well_typed(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_collectives, size)


def _layers(size: int) -> None:
    typing_rules.register()
    mesh = worker_mesh(size)
    tp = mesh.get_group("tp")
    embed = VocabParallelEmbedding(23, 8, mesh)
    up, gate = ColumnParallelLinear(8, 11, mesh), ColumnParallelLinear(8, 11, mesh, reads="R")
    gate.entry = SharedEntry(communicator(mesh), "gate")
    down = RowParallelLinear(11, 8, mesh)
    head = ColumnParallelLinear(8, 23, mesh, bias=False)
    for layer, dimension in ((embed, 0), (up, 0), (gate, 0), (head, 0), (down, 1)):
        spmd.assert_type(layer.weight, {tp: S(dimension)})
        bias = getattr(layer, "bias", None)
        if bias is not None:
            spmd.assert_type(bias, {tp: S(0) if dimension == 0 else I})
    with spmd.set_current_mesh(mesh["tp"]), spmd.checker.typecheck(local=False):
        ids, target = torch.randint(23, (2, 5)), torch.randint(23, (2, 5))
        for tensor in (ids, target):
            spmd.assert_type(tensor, {tp: R})
        hidden = embed(ids)
        spmd.assert_type(hidden, {tp: I})
        wide = F.silu(gate(hidden)) * up(hidden)
        spmd.assert_type(wide, {tp: V})
        out = down(wide)
        spmd.assert_type(out, {tp: I})
        logits = head(hidden + out)
        spmd.assert_type(logits, {tp: V})
        loss = cross_entropy(logits, target, mesh, vocabulary=23)
        spmd.assert_type(loss, {tp: I})
        with pytest.raises(SpmdTypeError):
            up(collectives.enter(hidden, mesh))  # entered twice: the gradient would be summed twice
        with pytest.raises(SpmdTypeError):
            down(hidden[..., :1].expand(2, 5, wide.shape[-1]))  # not this rank's features
    loss.backward()


@pytest.mark.parametrize("size", [2, 3])
def test_layers_are_well_typed(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_layers, size)
