"""Counting what is communicated: collectives, bytes and seconds, by operation, label and phase."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

GRADIENTS_OF_REPLICAS = "gradients of replicas"
"""With which the labels of collectives begin that average gradients over replicas."""


@dataclass(frozen=True)
class Call:
    """What identifies a collective in the statistics, in errors and in traces.

    Attributes:
        operation: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``broadcast``,
            ``reduce``, ``gather``, ``shift`` or ``barrier``.
        label: the action and the module path it serves, such as ``"exit model.layers.0.mlp.down_proj"``.
        phase: ``forward`` or ``backward`` (also what activation checkpointing recomputes in backward).
        bytes: size of the payload in bytes: the reduced tensor, or the gathered one.
    """

    operation: str
    label: str
    phase: str
    bytes: int


def current_phase() -> str:
    """``"backward"`` while autograd runs a backward pass on this thread, else ``"forward"``."""
    return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


@dataclass
class Tally:
    """Number of collectives, their payload in bytes and the seconds this rank spent in them."""

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.count + other.count, self.bytes + other.bytes, self.seconds + other.seconds)


@dataclass
class CommStats:
    """Tallies by (operation, label, phase). Seconds are host time from call to completion."""

    tallies: dict[tuple[str, str, str], Tally] = field(default_factory=dict)

    def record(self, call: Call) -> Tally:
        """Count a collective; gives the tally that it belongs to."""
        key = (call.operation, call.label, call.phase)
        tally = self.tallies.get(key)
        if tally is None:
            tally = self.tallies[key] = Tally()
        tally.count += 1
        tally.bytes += call.bytes
        return tally

    def add_seconds(self, call: Call, seconds: float) -> None:
        self.tallies.setdefault((call.operation, call.label, call.phase), Tally()).seconds += seconds

    def _sum(self, keep: Callable[[str, str, str], bool]) -> Tally:
        return sum((tally for key, tally in self.tallies.items() if keep(*key)), Tally())

    @property
    def total(self) -> Tally:
        return self._sum(lambda operation, label, phase: True)

    @property
    def count(self) -> int:
        return self.total.count

    @property
    def bytes(self) -> int:
        return self.total.bytes

    @property
    def seconds(self) -> float:
        return self.total.seconds

    def where(
        self, *, operation: str | None = None, phase: str | None = None, label: str | None = None
    ) -> Tally:
        """Sum over the calls of one operation, one phase, or labels that contain ``label``."""
        return self._sum(
            lambda an_operation, a_label, a_phase: (
                (operation is None or an_operation == operation)
                and (phase is None or a_phase == phase)
                and (label is None or label in a_label)
            )
        )

    def merge(self, others: Iterable[CommStats]) -> CommStats:
        """A new sum of this and ``others``."""
        merged = CommStats({key: Tally() + tally for key, tally in self.tallies.items()})
        for other in others:
            for key, tally in other.tallies.items():
                merged.tallies[key] = merged.tallies.get(key, Tally()) + tally
        return merged

    def __str__(self) -> str:
        rows = [
            f"{tally.count:6d} {operation:14s} {phase:8s} {tally.bytes:12d} B {tally.seconds:8.3f} s {label}"
            for (operation, label, phase), tally in sorted(self.tallies.items())
        ]
        return "\n".join(rows) or "nothing communicated"
