"""A blocking collective as ``torch.distributed`` knows them: while it runs, and when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from colrow.errors import RankFailure
from colrow.transport.errors import TransportError

LABEL = "torch.distributed"
"""Labels are colrow's own collectives'; this is that of all others."""


LOOK = timedelta(seconds=0.1)
"""How often a rank that waits for gloo lets Python look for signals."""


def wait_for(work: Any) -> None:
    """Wait for a collective of gloo's, so that Ctrl-C works meanwhile: gloo's own wait ends for no signal.

    Raises:
        RuntimeError: as gloo, if the collective does not complete.
    """
    while not work.is_completed():
        try:
            work.wait(LOOK)
            return
        except RuntimeError:
            if work.is_completed():  # now or in between: it may have failed or not
                break
    work.wait()


class Interruptible:
    """A collective of gloo's under way; see :func:`wait_for`."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        """Return once it is complete."""
        wait_for(self._work)


class Completed(dist.Work):
    """A collective that is done when its call returns."""

    def __init__(self, result: list[Tensor]) -> None:
        super().__init__()
        self._tensors = result

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    def exception(self) -> None:
        return None

    def result(self) -> list[Tensor]:
        return self._tensors

    def get_future(self) -> Future:
        future: Future = Future()
        future.set_result(self._tensors)
        return future


class Waiting:
    """A collective under way, with what the other ranks ask about it when one of them fails."""

    def __init__(self, operation: str, ranks: Sequence[int]) -> None:
        from colrow.collectives.statistics import Call, current_phase

        self._call = Call(operation, LABEL, current_phase(), 0)
        self._ranks = ranks

    def wait(self, function: Callable[[], None], error_type: type[Exception] = TransportError) -> None:
        """Run a blocking collective, which raises errors of a type if another rank is at fault.

        Raises:
            RankFailure: if another rank died, raised or did not come within the group's timeout.
        """
        begin = time.perf_counter()  # read from this frame by current_position
        try:
            function()
        except error_type as error:
            raise self._diagnose(error) from error
        self.seconds = time.perf_counter() - begin

    def _diagnose(self, error: Exception) -> RankFailure:
        """The failure, with the user's line: labels are colrow's own collectives'."""
        from colrow.collectives.failure import diagnose
        from colrow.collectives.position import describe_collective, own_place

        failure = diagnose(error, self._call, self._ranks)
        where = describe_collective(self._call.operation, self._call.label)
        message = own_place() + str(failure).removeprefix(where)
        return RankFailure(message, failure.ranks, failure.label)
