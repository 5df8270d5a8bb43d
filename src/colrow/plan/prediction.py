"""What a plan costs: its collectives, and what each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class PredictedCollective:
    """One kind of collective at one kind of place, as often as it happens in a pass.

    Attributes:
        mode: the traced example that it belongs to: ``training``, ``evaluation``.
        direction: pass in which it happens.
        kind: ``all-reduce`` or ``all-gather``.
        label: where, with numbers of repeated layers as ``*``.
        shape: of what is communicated, as traced; of an all-gather, the result.
        bytes: of one such tensor.
        count: how often.
        members: the ranks that take part; empty: all.
        varies: whether it depends on data how often it happens, as within a loop over the experts that
            tokens are routed to; ``count`` is a guess then.
    """

    mode: str
    direction: Direction
    kind: str
    label: str
    shape: tuple[int, ...]
    bytes: int
    count: int
    members: tuple[int, ...] = ()
    varies: bool = False


@dataclass(frozen=True)
class Prediction:
    """What is known about a plan before it is applied.

    Attributes:
        collectives: of one forward and backward pass of each traced example.
        parameters: numbers of parameters: of the whole model, and held by each rank.
        parameter_bytes: likewise in bytes.
    """

    collectives: tuple[PredictedCollective, ...]
    parameters: tuple[int, tuple[int, ...]]
    parameter_bytes: tuple[int, tuple[int, ...]]
