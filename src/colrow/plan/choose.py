"""Which of the candidates are cut: most memory first, and no two that meet in one operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from math import prod

from colrow.axes import Axes
from colrow.errors import PlanError
from colrow.layout import Cut
from colrow.plan.candidates import Candidate

#: What saves less than this share of all parameters, over all repeated layers, is not worth a collective.
LEAST_SAVED = 0.004


def choose(axes: Axes, candidates: Sequence[Candidate], banned: Collection[str] = ()) -> list[Candidate]:
    """The candidates to cut, in a fixed order.

    Taken by memory saved over all repeated layers, then by traffic; what runs through the model's inputs is
    taken last. Ranked by the ratio of memory and traffic, the size of the heads would be preferred to their
    number in grouped attention.

    Args:
        axes: for the size of the model.
        candidates: all of them, see :func:`colrow.plan.candidates.find_candidates`.
        banned: signatures of those that must stay whole.
    """
    total = sum(prod(value.shape) for value in axes.trace.values if value.source.kind == "parameter")
    groups: dict[str, float] = defaultdict(float)
    eligible = [one for one in candidates if not one.illegal and one.saved and key(one) not in banned]
    for candidate in eligible:
        groups[key(candidate)] += candidate.saved
    ordered = sorted(
        eligible,
        key=lambda one: (
            one.is_given,
            -groups[key(one)],
            -one.saved,
            one.traffic,
            one.within is not None,
            one.axis.index,
        ),
    )
    taken: dict[int, Candidate] = {}
    chosen = []
    for candidate in ordered:
        if groups[key(candidate)] < LEAST_SAVED * total:
            continue
        if not any(index in taken for index in candidate.operations):
            taken.update(dict.fromkeys(candidate.operations, candidate))
            chosen.append(candidate)
    return sorted(chosen, key=lambda one: one.outer.index)


def key(candidate: Candidate) -> str:
    """What repeated layers' candidates have in common: they are taken or banned together."""
    kind = "pair" if candidate.within is not None else "axis"
    return f"{kind} of {candidate.units}: {candidate.signature}"


def cut_of(candidate: Candidate, ranks: int, share: Sequence[float] | None) -> Cut:
    """How the units are divided over the ranks; every rank gets at least one.

    Raises:
        PlanError: if ``share`` does not have one positive number for each rank.
    """
    if share is not None and (len(share) != ranks or min(share) <= 0):
        raise PlanError("", f"share is {list(share)} for {ranks} ranks", "Give one positive number per rank.")
    weights = [1.0] * ranks if share is None else list(share)
    if candidate.within is None:
        blocks, rest = divmod(candidate.units, candidate.alignment)
        if rest == 0 and blocks >= ranks:
            counts = _at_least_one(blocks, weights).counts
            return Cut.from_counts([count * candidate.alignment for count in counts])
        return _at_least_one(candidate.units, weights)
    # consecutive ranks share a unit of the outer axis, and divide what lies within
    shared: list[int] = []
    for sharers in Cut.balanced(ranks, candidate.within.size).counts:
        group = weights[len(shared) : len(shared) + sharers]
        shared += _at_least_one(candidate.axis.size, group).counts
    return Cut.from_counts(shared)


def _at_least_one(units: int, weights: Sequence[float]) -> Cut:
    """In proportion to the weights, but nobody goes without: what else would a rank compute?"""
    rest = Cut.weighted(units - len(weights), _less_one(units, weights))
    return Cut.from_counts([count + 1 for count in rest.counts])


def _less_one(units: int, weights: Sequence[float]) -> list[float]:
    """Weights of what remains when everybody has got one unit."""
    exact = [units * weight / sum(weights) for weight in weights]
    rest = [max(value - 1, 0.0) for value in exact]
    return rest if sum(rest) else [1.0] * len(weights)
