"""What a distributed product gives back: the product and what was communicated for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from colrow.collectives import CommStats, Communicator, Tally


@dataclass(frozen=True, repr=False)
class MatmulResult:
    """The product C = A B, or this rank's part of it.

    Attributes:
        product: the rows and columns of C that this rank holds.
        shape: shape of the whole C.
        rows, columns: half-open ranges of C's rows and columns that ``product`` covers.
        split: how the work was split: ``"column"``, ``"row"`` or ``"2d"``.
        communication: count, payload bytes and seconds of this rank's collectives in this call, by operation
            and label. Those of a later backward pass are in :func:`colrow.comm_stats` under the same label.
    """

    product: Tensor
    shape: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    split: str
    communication: CommStats

    @property
    def is_whole(self) -> bool:
        """Whether ``product`` is all of C."""
        return (self.rows, self.columns) == ((0, self.shape[0]), (0, self.shape[1]))

    def __repr__(self) -> str:
        size = f"{self.shape[0]} x {self.shape[1]}"
        what = f"the whole {size} product"
        if not self.is_whole:
            rows, columns = (f"{low}:{high}" for low, high in (self.rows, self.columns))
            what = f"[{rows}, {columns}] of the {size} product"
        dtype = str(self.product.dtype).removeprefix("torch.")
        return f"MatmulResult({what}, {dtype}, {self.split} split; {_described(self.communication)})"


def _described(communication: CommStats) -> str:
    operations = sorted({operation for operation, _, _ in communication.tallies})
    parts = []
    for operation in operations:
        tally = communication.where(operation=operation)
        parts.append(f"{tally.count} {operation} of {tally.bytes} bytes")
    return ", ".join(parts) or "nothing communicated"


class Meter:
    """What the communicators move from the making of the meter until it is read."""

    def __init__(self, communicators: Sequence[Communicator]) -> None:
        self._communicators = communicators
        self._before = self._now()

    def _now(self) -> CommStats:
        return CommStats().merge(one.statistics for one in self._communicators)

    def read(self) -> CommStats:
        moved = CommStats()
        for key, now in self._now().tallies.items():
            before = self._before.tallies.get(key, Tally())
            if now.count > before.count:
                moved.tallies[key] = Tally(
                    now.count - before.count, now.bytes - before.bytes, now.seconds - before.seconds
                )
        return moved
