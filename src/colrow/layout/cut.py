"""How the units of an axis are divided over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Cut:
    """Boundaries ``0 = b[0] <= b[1] <= ... <= b[N] = units`` of an axis over N ranks.

    Rank r holds the units ``b[r]`` up to, not including, ``b[r + 1]``. Shares may be uneven, and a rank
    may hold no unit at all.

    Raises:
        ValueError: if the boundaries do not start at 0 or decrease.
    """

    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.boundaries) < 2 or self.boundaries[0] != 0:
            raise ValueError(f"a cut needs boundaries 0 = b0 <= b1 <= ..., not {self.boundaries}")
        if any(low > high for low, high in pairwise(self.boundaries)):
            raise ValueError(f"the boundaries of a cut must not decrease: {self.boundaries}")

    @classmethod
    def balanced(cls, units: int, ranks: int) -> Cut:
        """Every rank gets ``units // ranks``; the first ``units % ranks`` ranks get one more."""
        if units < 0 or ranks < 1:
            raise ValueError(f"cannot cut {units} units over {ranks} ranks")
        share, rest = divmod(units, ranks)
        return cls.from_counts([share + (rank < rest) for rank in range(ranks)])

    @classmethod
    def weighted(cls, units: int, weights: Sequence[float]) -> Cut:
        """Shares in proportion to ``weights`` (one per rank), rounded by largest remainder.

        Ties go to the lower rank, so that all ranks compute the same cut.
        """
        total = sum(weights)
        if units < 0 or not weights or total <= 0 or any(weight < 0 for weight in weights):
            raise ValueError(f"cannot cut {units} units by the weights {list(weights)}")
        exact = [units * weight / total for weight in weights]
        counts = [int(value) for value in exact]
        by_remainder = sorted(range(len(weights)), key=lambda rank: (counts[rank] - exact[rank], rank))
        for rank in by_remainder[: units - sum(counts)]:
            counts[rank] += 1
        return cls.from_counts(counts)

    @classmethod
    def from_counts(cls, counts: Sequence[int]) -> Cut:
        """The cut that gives rank r exactly ``counts[r]`` units."""
        return cls((0, *accumulate(counts)))

    @property
    def units(self) -> int:
        return self.boundaries[-1]

    @property
    def ranks(self) -> int:
        return len(self.boundaries) - 1

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in pairwise(self.boundaries))

    def start(self, rank: int) -> int:
        return self.boundaries[rank]

    def stop(self, rank: int) -> int:
        return self.boundaries[rank + 1]

    def count(self, rank: int) -> int:
        return self.boundaries[rank + 1] - self.boundaries[rank]
