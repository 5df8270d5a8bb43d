"""A plain collective under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from colrow.collectives.failure import diagnose
from colrow.collectives.statistics import Call, CommStats


class Work(Protocol):
    """What a transport gives for a collective that it has begun, such as ``torch.distributed.Work``."""

    def wait(self) -> object:
        """Return once it is complete."""


class Step:
    """What blocks until all ranks have come and is no collective, such as making a process group."""

    def __init__(self, call: Call, ranks: Sequence[int]) -> None:
        self._call = call
        self._ranks = ranks

    def wait(self, function: Callable[[], None]) -> None:
        """Run it.

        Raises:
            RankFailure: if it raises RuntimeError, because another rank did not do its part.
        """
        begin = time.perf_counter()  # read from this frame by current_position
        try:
            function()
        except RuntimeError as error:
            raise diagnose(error, self._call, self._ranks) from error
        self.seconds = time.perf_counter() - begin


class Pending:
    """A collective under way. :meth:`wait` completes it and gives its result, once or repeatedly."""

    def __init__(
        self,
        call: Call,
        ranks: Sequence[int],
        statistics: CommStats,
        work: Work | None,
        finish: Callable[[], Tensor],
    ) -> None:
        self._call = call
        self._ranks = ranks
        self._statistics = statistics
        self._work = work
        self._finish: Callable[[], Tensor] | None = finish
        self._result: Tensor | None = None

    @classmethod
    def completed(cls, result: Tensor) -> Pending:
        """A collective that had nothing to move."""
        pending = cls.__new__(cls)
        pending._finish = None
        pending._result = result
        return pending

    def wait(self) -> Tensor:
        """The result.

        Raises:
            RankFailure: if another rank died, raised or did not come within the group's timeout.
        """
        if self._finish is not None:
            if self._work is not None:
                begin = time.perf_counter()
                try:
                    self._work.wait()
                except RuntimeError as error:
                    raise diagnose(error, self._call, self._ranks) from error
                self._statistics.add_seconds(self._call, time.perf_counter() - begin)
            self._result = self._finish()
            self._work = self._finish = None
        assert self._result is not None
        return self._result
