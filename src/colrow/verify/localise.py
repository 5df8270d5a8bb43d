"""Finding where two models first part: forward by their values, backward by their gradients.

Where a tensor of the cut model is neither equal to the whole model's on every rank, nor a part of it, nor a
term of a sum over the ranks, it differs. The first one that certainly does (it has the right shape) is
followed against the dataflow as long as something that it was computed from differs, too. What is found last
differs although it was computed from what does not.

A sum that is pending is right as long as somebody adds it up. Where it is used as if it were whole, a
reduction is missing, and what began the sum is to be named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from colrow.verify.exchange import Exchange
from colrow.verify.measure import Relation, largest_error, magnitude, relate
from colrow.verify.record import Event, Recording
from colrow.verify.report import Difference

LOOSEST = 1e-6
"""A large error is sought with this tolerance, so that rounding on the way to it is not taken for it."""
FLOOR = 1e-6
"""Tensors smaller than this part of the largest one are measured by that."""

Direction = Literal["forward", "backward"]
_PENDING = "a sum over the ranks that is pending"


class Localiser:
    """Compares the recordings of the two models. Every rank makes one and asks it the same questions.

    Args:
        expected: the whole model's recording, the same on every rank.
        found: the cut model's on this rank.
        model: the whole model, for the names of modules' classes.
        exchange: with the other ranks.
        tolerance: of the comparison.
        error: the error whose cause is sought.
    """

    def __init__(
        self,
        expected: Recording,
        found: Recording,
        model: nn.Module,
        exchange: Exchange,
        tolerance: float,
        error: float,
    ) -> None:
        self._expected, self._found = expected, found
        self._events = expected.events
        self._model, self._exchange = model, exchange
        self._tolerance = max(tolerance, min(LOOSEST, error * 1e-3))
        # points that the cut model passes on every rank; a layer that it replaces is compared as a whole
        own = {event.key: event for event in found.events}
        common = set.intersection(*exchange.gather(set(own)))
        self._counterparts = [own[event.key] if event.key in common else None for event in self._events]
        self._readers: list[list[int]] = [[] for _ in self._events]
        for index, event in enumerate(self._events):
            for source in event.sources:
                self._readers[source].append(index)
        self._same_tensor: dict[int, list[int]] = {}
        for index, event in enumerate(self._events):
            self._same_tensor.setdefault(id(event.gradient), []).append(index)
        self._relations: dict[tuple[Direction, int], Relation | None] = {}
        self._floors: dict[Direction, float] = {}
        for direction in ("forward", "backward"):
            self._compare_alone(direction)

    def forward(self) -> Difference | None:
        """The first value that differs though what it was computed from does not; None if none does."""
        found = self._first("forward", range(len(self._events)))
        if found is None:
            return None
        while before := self._near(found, "forward", "none"):
            found = min(before)
        pending = self._near(found, "forward", "sum")
        return self._describe_forward(found, pending)

    def backward(self, parameters: Sequence[str]) -> Difference | None:
        """The gradient that differs though those it was computed from do not, the first from the outputs.

        Args:
            parameters: names of those whose gradients differ.
        """
        found = self._first("backward", range(len(self._events) - 1, -1, -1))
        while found is not None and (after := self._near(found, "backward", "none")):
            found = max(after)
        # where a tied parameter is used several times any use may be to blame: the last in this order counts
        first_uses: dict[str, int] = {}
        for index, event in enumerate(self._events):
            for name in event.parameters:
                first_uses.setdefault(name, index)
        uses = [(first_uses[name], name) for name in parameters if name in first_uses]
        use, name = max(uses, default=(-1, ""))
        if found is None and use < 0:
            return None
        if found is None or use > found:
            kind = self._kind(use, "backward")
            pending = [use] if kind == "sum" else []
            if not kind:
                pending = self._near(use, "backward", "sum")
            if not pending:
                return self._describe_parameter(use, name)
            return self._describe_pending(pending[0], f"where it reaches the parameter {name}")
        pending = self._near(found, "backward", "sum")
        if pending:
            where = f"where it becomes part of the gradient of {self._events[found]}"
            return self._describe_pending(pending[0], where)
        return self._describe_backward(found)

    # relations

    def _compare_alone(self, direction: Direction) -> None:
        """Note what is equal on every rank, which takes one exchange for all."""
        pairs = [self._pair(index, direction) for index in range(len(self._events))]
        sizes = [magnitude(expected) for pair in pairs if pair for expected in pair[:1]]
        floor = self._floors[direction] = FLOOR * max(sizes, default=0.0)
        errors = [largest_error(pair[1], pair[0], floor) if pair else 0.0 for pair in pairs]
        of_ranks = self._exchange.gather(errors)
        for index, pair in enumerate(pairs):
            error = max(of_rank[index] for of_rank in of_ranks)
            if pair is None:
                self._relations[direction, index] = None
            elif error <= self._tolerance:
                self._relations[direction, index] = Relation("whole", error)

    def _pair(self, index: int, direction: Direction) -> tuple[Tensor, Tensor] | None:
        """A tensor of the whole model and this rank's; None if it cannot be compared."""
        event, own = self._events[index], self._counterparts[index]
        if own is None:
            return None
        if direction == "forward":
            return event.value, own.value
        if event.gradient.tensor is None:
            return None
        gradient = own.gradient.tensor
        return event.gradient.tensor, torch.zeros_like(own.value) if gradient is None else gradient

    def _relation(self, index: int, direction: Direction) -> Relation | None:
        key = (direction, index)
        if key not in self._relations:
            pair = self._pair(index, direction)
            assert pair is not None  # else it would be known
            parts = self._exchange.gather(pair[1])
            relation = relate(parts, pair[0], self._tolerance, self._floors[direction])
            # all ranks must go the same way, even where a program reads memory that it has not written
            relation = self._exchange.gather(relation)[0]
            is_other = direction == "backward" and relation.kind == "none" and self._is_aside(index)
            self._relations[key] = None if is_other else relation
        return self._relations[key]

    def _is_aside(self, index: int) -> bool:
        """Whether the cut model has another tensor here than where the whole one's tensor was made.

        So it is behind an entry: then the gradient is that of some of the tensor's uses only.
        """
        same = self._same_tensor[id(self._events[index].gradient)]
        counterparts = [self._counterparts[one] for one in same]
        first = next(one for one in counterparts if one is not None)
        own = self._counterparts[index]
        return own is not None and own.gradient is not first.gradient

    def _kind(self, index: int, direction: Direction) -> str:
        relation = self._relation(index, direction)
        return "" if relation is None else relation.kind

    def _first(self, direction: Direction, indices: Iterable[int]) -> int | None:
        """The first tensor that differs for certain, or else that cannot be matched."""
        uncertain = None
        for index in indices:
            relation = self._relation(index, direction)
            if relation is not None and relation.kind == "none":
                if relation.same_shape:
                    return index
                uncertain = index if uncertain is None else uncertain
        return uncertain

    # dataflow of the whole model

    def _users(self, index: int) -> Sequence[int]:
        """What is computed from a tensor, at whichever of the points that it passes."""
        same = self._same_tensor[id(self._events[index].gradient)]
        return sorted({reader for one in same for reader in self._readers[one]} - set(same))

    def _near(self, index: int, direction: Direction, kind: str) -> list[int]:
        """The nearest events of this kind among those that a tensor was computed from.

        Events that cannot be compared are passed. Gradients are computed from those of a tensor's users.
        """
        found, seen = [], {index}
        frontier = list(self._events[index].sources if direction == "forward" else self._users(index))
        while frontier:
            one = frontier.pop(0)
            if one in seen:
                continue
            seen.add(one)
            its_kind = self._kind(one, direction)
            if its_kind == kind:
                found.append(one)
            elif not its_kind:
                frontier += self._events[one].sources if direction == "forward" else self._readers[one]
        return found

    def _begin_of_sum(self, index: int, direction: Direction) -> int:
        """The event at which a sum that is pending began."""
        while further := self._near(index, direction, "sum"):
            index = further[0]
        return index

    def _first_user(self, index: int) -> Event:
        """What uses a tensor: first what computes a part of something, whose gradient is a part of a sum."""
        for kind in ("cut", "whole"):
            users = self._near(index, "backward", kind)
            if users:
                return self._events[min(users)]
        return self._events[index]

    # words

    def _describe_forward(self, found: int, pending: Sequence[int]) -> Difference:
        event = self._events[found]
        if pending:
            begin = self._events[self._begin_of_sum(pending[0], "forward")]
            if begin.module != event.module:
                detail = f"it is {_PENDING} where {event} uses it as if it were whole"
                return self._difference("forward", begin, self._error(found, "forward"), detail)
        sources = [
            f"{self._events[one]} ({self._relation(one, 'forward')})"
            for kind in ("whole", "cut", "sum")
            for one in self._near(found, "forward", kind)
        ]
        detail = f"computed from {', '.join(sources[:4])}" if sources else ""
        return self._difference("forward", event, self._error(found, "forward"), detail)

    def _describe_backward(self, found: int) -> Difference:
        event = self._events[found]
        detail = f"the gradient of {event} differs, although those of what is computed from it do not"
        return self._difference("backward", self._first_user(found), self._error(found, "backward"), detail)

    def _describe_pending(self, index: int, where: str) -> Difference:
        begin = self._begin_of_sum(index, "backward")
        detail = f"the gradient of its input is {_PENDING} {where}: a reduction is missing"
        return self._difference("backward", self._first_user(begin), float("inf"), detail)

    def _describe_parameter(self, use: int, name: str) -> Difference:
        event = self._events[use]
        expected = self._expected.parameters[name]
        own = self._found.parameters.get(name)
        parts = self._exchange.gather(own)
        if any(part is None for part in parts):
            missing = [rank for rank, part in enumerate(parts) if part is None]
            detail, error = f"the parameter {name} has no gradient on ranks {missing}", float("inf")
        else:
            relation = relate([part for part in parts if part is not None], expected, self._tolerance)
            error = relation.error
            if relation.kind == "sum":
                error = max(largest_error(part, expected) for part in parts if part is not None)
                detail = f"the gradient of the parameter {name} is {_PENDING}: a reduction is missing"
            else:
                detail = (
                    f"the gradient of the parameter {name} differs, although those of what is computed from "
                    "it do not"
                )
        return self._difference("backward", event, error, detail)

    def _error(self, index: int, direction: Direction) -> float:
        relation = self._relation(index, direction)
        assert relation is not None
        return relation.error

    def _difference(self, direction: Direction, event: Event, error: float, detail: str) -> Difference:
        return Difference(
            direction,
            event.module,
            type(self._model.get_submodule(event.module)).__name__,
            event.function,
            str(event.place),
            event.place.text,
            error,
            detail,
        )
