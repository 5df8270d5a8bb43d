"""What colrow's collectives and layers do to placements, told to the checker of the ``spmd-types`` package.

R, I, V and P are that package's types; here each of colrow's autograd functions gets its rule, written from
the documentation of the function and not from its code, so that the two check each other.
"""

from __future__ import annotations

from typing import Any

from spmd_types import I, P, R, S, rules
from torch import Tensor

from colrow.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Collective,
    Enter,
    FirstRankOnly,
    ReduceScatter,
    Slice,
    typed,
)
from colrow.layers import embedding, linear_functions

REPLICATION = {"I": I, "R": R}


def _collective(*, x: Tensor, collective: Collective) -> Any:
    group = collective.communicator.group
    match collective:
        case Enter():
            return rules.reinterpret(x, group, src=I, dst=R)
        case AllReduce():
            return rules.all_reduce(x, group, src=P, dst=REPLICATION[collective.dst])
        case AllGather():
            return rules.all_gather(x, group, src=S(collective.dimension), dst=REPLICATION[collective.dst])
        case ReduceScatter():
            return rules.reduce_scatter(x, group, src=P, dst=S(collective.dimension))
        case Slice():
            return rules.convert(x, group, src=REPLICATION[collective.src], dst=S(collective.dimension))
        case FirstRankOnly():
            return rules.convert(x, group, src=REPLICATION[collective.src], dst=P)
        case AllToAll():
            src, dst = S(collective.concat_dimension), S(collective.split_dimension)
            return rules.all_to_all(x, group, src=src, dst=dst)
    raise AssertionError(f"no rule for {type(collective).__name__}")


def _pending(*, x: Tensor, result: Tensor, collective: Collective) -> Any:
    rules.ignore(result)
    return _collective(x=x, collective=collective)


def _column(*, x: Tensor, weight: Tensor, bias: Tensor | None, ranks: Any, out_first: bool) -> Any:
    entered = rules.reinterpret(x, ranks.group, src=I, dst=R)
    y = rules.einsum("...i,oi->...o" if out_first else "...i,io->...o", entered, weight)
    return y if bias is None else rules.einsum("...o,o->...o", y, bias)


def _row(*, x: Tensor, weight: Tensor, bias: Tensor | None, ranks: Any, out_first: bool) -> Any:
    partial = rules.einsum("...i,oi->...o" if out_first else "...i,io->...o", x, weight)
    y = rules.all_reduce(partial, ranks.group, src=P, dst=I)
    return y if bias is None else rules.einsum("...o,o->...o", y, bias)


def _lookup(
    *, weight: Tensor, local_ids: Tensor, missing: Tensor, without_gradient: Tensor, ranks: Any
) -> Any:
    rules.ignore(missing, without_gradient)
    partial = rules.einsum("...,vh->...h", local_ids, weight)  # one-hot ids times the table
    return rules.all_reduce(partial, ranks.group, src=P, dst=I)


def _cross_entropy(*, logits: Tensor, inputs: Any) -> Any:
    partial = rules.einsum("tv,t->t", logits, inputs.target)  # sums over this rank's ids
    return rules.all_reduce(partial, inputs.options.ranks.group, src=P, dst=I)


def register() -> None:
    """Give each autograd function its rule, in this process."""
    import importlib

    losses = importlib.import_module("colrow.layers.cross_entropy")
    for function, rule in (
        (typed._Apply, _collective),
        (typed._Attach, _pending),
        (linear_functions.ColumnLinear, _column),
        (linear_functions.RowLinear, _row),
        (embedding._Lookup, _lookup),
        (losses._CrossEntropy, _cross_entropy),
    ):
        function.spmd_typecheck = staticmethod(rule)  # type: ignore[attr-defined]
