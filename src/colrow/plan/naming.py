"""Names for axes: what they are used for, from the operators that they meet."""

from __future__ import annotations

from collections.abc import Sequence

from colrow.axes import Axes, Axis
from colrow.plan.candidates import Candidate
from colrow.plan.choose import key

_PRODUCTS = ("aten.bmm", "aten.baddbmm")


def names_of(axes: Axes, candidates: Sequence[Candidate]) -> list[str]:
    """One name for each candidate; alike ones of repeated layers have the same.

    ``vocab`` for tables and the classes of a loss, ``heads`` for what attention's products are computed for
    one by one, ``channels`` for convolutions, ``features`` for all else; numbered where there are several.
    """
    names: dict[str, str] = {}
    used: dict[str, int] = {}
    for candidate in candidates:
        label = key(candidate)
        if label not in names:
            kind = _kind(axes, candidate)
            used[kind] = used.get(kind, 0) + 1
            names[label] = kind if used[kind] == 1 else f"{kind}_{used[kind]}"
    return [names[key(candidate)] for candidate in candidates]


def _kind(axes: Axes, candidate: Candidate) -> str:
    axis = candidate.outer
    if axis.losses or any(operation.name == "aten.embedding" for operation in axis.lookups):
        return "vocab"
    if candidate.within is not None or _is_batched(axes, axis):
        return "heads"
    if axis.lookups:
        return "experts"
    if any("convolution" in operation.name for operation in axis.contractions):
        return "channels"
    return "features"


def _is_batched(axes: Axes, axis: Axis) -> bool:
    """Whether products are computed for each of its units."""
    for value, dimension in axis.members:
        if dimension == 0 and any(use.name in _PRODUCTS for use in value.uses):
            return True
    return False
