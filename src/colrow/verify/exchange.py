"""What the ranks tell each other during a verification, so that all of them always go the same way."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from colrow.collectives import Call, Communicator
from colrow.collectives.failure import diagnose, rank_failure_behind
from colrow.verify.place import place_of_error

T = TypeVar("T")

TIMEOUT_SECONDS = 900.0
"""How long a rank waits for the others. Above the timeout of the group that is verified, so that a rank
that waits there for one that has failed comes here in the end."""


@dataclass(frozen=True)
class Raised:
    """An exception on one rank, as the other ranks see it.

    Attributes:
        rank: where it was raised.
        error: type and message.
        module: path of the innermost module whose code ran; empty if none did.
        place: file and line; the line's text.
        because_of_others: a collective that another rank did not reach.
    """

    rank: int
    error: str
    module: str
    place: str
    text: str
    because_of_others: bool

    def __str__(self) -> str:
        where = f" at {self.place}: {self.text}" if self.place else ""
        return f"{self.error}{where}"


class RanksRaised(Exception):
    """Some rank raised; on every rank alike.

    Attributes:
        first: the exception that explains the others.
        ranks: those that raised it or another of their own.
        own: the exception of this rank, if it raised one.
    """

    def __init__(self, raised: list[Raised], own: Exception | None) -> None:
        causes = [one for one in raised if not one.because_of_others] or raised
        self.first = causes[0]
        self.ranks = tuple(one.rank for one in causes)
        self.own = own
        super().__init__(str(self.first))


class Exchange:
    """Connections of its own between the ranks: the group that is verified may be out of step, or broken.

    Use it as a context: connections end with it.
    """

    def __init__(self, ranks: Communicator) -> None:
        self._ranks = ranks
        self.rank, self.size = ranks.rank, ranks.size
        self._group: ProcessGroupGloo | None = None

    def __enter__(self) -> Exchange:
        if self.size > 1:
            # not a registered group, whose name, and with it addresses in the store, would be used again
            store = _get_default_store()
            members = ",".join(map(str, self._ranks.global_ranks))
            number = store.add(f"colrow verification of {members} on {self.rank}", 1)
            own_store = PrefixStore(f"colrow verification {number} of {members}", store)
            limit = timedelta(seconds=TIMEOUT_SECONDS)
            self._group = ProcessGroupGloo(own_store, self.rank, self.size, limit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._group = None

    def gather(self, mine: T) -> list[T]:
        """What each rank gives, in rank order, on every rank.

        Raises:
            RankFailure: if a rank has died or does not come.
        """
        if self._group is None:
            return [mine]
        try:
            with torch._C.DisableTorchFunction():
                own = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
                sizes = [
                    int(size) for size in self._gather_tensors(torch.tensor([own.numel()]), [1] * self.size)
                ]
                everyone = self._gather_tensors(own, sizes)
        except RuntimeError as error:
            call = Call("all_gather", "verification", "forward", 0)
            raise diagnose(error, call, self._ranks.global_ranks) from error
        return [pickle.loads(one.numpy().tobytes()) for one in everyone]

    def _gather_tensors(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        assert self._group is not None
        largest = max(sizes)
        padded = torch.cat([own, own.new_zeros(largest - own.numel())])
        received = [torch.empty_like(padded) for _ in sizes]
        self._group.allgather([received], [padded]).wait()  # type: ignore[attr-defined]
        return [one[:size] for one, size in zip(received, sizes, strict=True)]

    def together(self, work: Callable[[], T], model: nn.Module) -> T:
        """The result of ``work``, which runs ``model``, once it is known that it went well on every rank.

        Raises:
            RanksRaised: if it raised on any.
        """
        result: list[T] = []
        own: Exception | None = None
        try:
            result.append(work())
        except Exception as error:
            own = error
        mine = None if own is None else _describe(own, model, self.rank)
        raised = [one for one in self.gather(mine) if one is not None]
        if raised:
            raise RanksRaised(raised, own) from own
        return result[0]


def _describe(error: Exception, model: nn.Module, rank: int) -> Raised:
    module, place = place_of_error(error, model)
    lines = str(error).strip().splitlines() or [""]
    return Raised(
        rank,
        f"{type(error).__name__}: {lines[0]}".removesuffix(": "),
        module,
        str(place) if place else "",
        place.text if place else "",
        rank_failure_behind(error) is not None,
    )
