"""Whether it pays to cut a sequence between regions, and what of it stays whole."""

from __future__ import annotations

from collections.abc import Iterable

from colrow.plan.exits import Reductions
from colrow.plan.plan import Plan
from colrow.plan.sequence.cut import SequenceCut

MORE = 1.1
"""So many times the bytes of the plan without may go over the wire, for the memory that is saved."""


def pays(plan: Plan, without: Plan) -> bool:
    """Whether ``plan`` communicates hardly more than the same plan without sequences."""
    return _moved(plan) <= MORE * _moved(without)


def _moved(plan: Plan) -> int:
    """Bytes that go over the wire in a step: an all-reduce is a reduce-scatter and an all-gather.

    What is gathered again is not counted: that is done while a rank computes.
    """
    collectives = plan.prediction.collectives if plan.prediction is not None else ()
    mode = next((one.mode for one in collectives), "")
    return sum(
        one.bytes * one.count * (2 if one.kind == "all-reduce" else 1)
        for one in collectives
        if one.mode == mode and not one.label.startswith("again ")
    )


def notes_of_sequences(sequences: Iterable[SequenceCut], reductions: Reductions) -> list[str]:
    """What leaves regions whole, for people."""
    scattered = {index for sequence in sequences for index in sequence.scattered}
    whole = [one for one in reductions.all if one.value.index not in scattered]
    paths = list(dict.fromkeys(one.module.path or "the model" for one in whole))
    return [f"{path}: what leaves its region is whole, not cut along the sequence" for path in paths]
