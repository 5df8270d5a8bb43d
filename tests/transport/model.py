"""A model of the flags protocol, and a checker that tries every order in which ranks can take their steps.

What each rank does is a fixed list of steps, so a state is how far each rank has come: all else (flags, what
is in the slots, who is in the middle of reading or writing) follows from that. The steps are those of
``rounds.h``, ``reduce.c`` and ``exchange.c``, in their order; copying takes two steps, begin and end, so that
the others can come between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STAGED, REDUCED, GATHERED = "staged", "reduced", "gathered"


@dataclass(frozen=True)
class Step:
    """One step of a rank.

    Attributes:
        kind: ``wait``, ``raise``, ``begin`` or ``end`` of reading or writing.
        flag: which flag is waited for or raised.
        rounds: to what number.
        writes: the slot that is written, as (``stage`` or ``result``, number).
        reads: kind and number of the slots of all others that are read, with the round that must be in there.
        round: that the data belong to.
    """

    kind: str
    flag: str = ""
    rounds: int = 0
    writes: tuple[str, int] | None = None
    reads: tuple[str, int] | None = None
    round: int = -1


def one_shot(first: int, slots: int) -> list[Step]:
    """All-gather, small all-reduce: stage, read what the others staged."""
    return [
        Step("wait", REDUCED, first + 1 - slots),
        Step("begin", writes=("stage", first % slots), round=first),
        Step("end", writes=("stage", first % slots), round=first),
        Step("raise", STAGED, first + 1),
        Step("wait", STAGED, first + 1),
        Step("begin", reads=("stage", first % slots), round=first),
        Step("end", reads=("stage", first % slots), round=first),
        Step("raise", REDUCED, first + 1),
        Step("raise", GATHERED, first + 1),
    ]


def barrier(first: int, slots: int) -> list[Step]:
    """Nothing is staged."""
    return [
        Step("raise", STAGED, first + 1),
        Step("wait", STAGED, first + 1),
        Step("raise", REDUCED, first + 1),
        Step("raise", GATHERED, first + 1),
    ]


def in_chunks(first: int, chunks: int, slots: int) -> list[Step]:
    """A large all-reduce: chunk c is staged, c - 1 reduced, c - 2 gathered."""
    steps: list[Step] = []
    for index in range(chunks + 2):
        if index < chunks:
            steps += one_shot(first + index, slots)[:4]
        if 0 <= index - 1 < chunks:
            now = first + index - 1
            steps += [
                Step("wait", STAGED, now + 1),
                Step("wait", GATHERED, now + 1 - slots),
                Step("begin", reads=("stage", now % slots), writes=("result", now % slots), round=now),
                Step("end", reads=("stage", now % slots), writes=("result", now % slots), round=now),
                Step("raise", REDUCED, now + 1),
            ]
        if index >= 2:
            now = first + index - 2
            steps += [
                Step("wait", REDUCED, now + 1),
                Step("begin", reads=("result", now % slots), round=now),
                Step("end", reads=("result", now % slots), round=now),
                Step("raise", GATHERED, now + 1),
            ]
    return steps


def scatter(first: int, rounds: int, slots: int) -> list[Step]:
    """Reduce-scatter, all-gather, and a large all-reduce of two ranks: round r is staged, then r - 1 read."""
    steps: list[Step] = []
    for index in range(rounds + 1):
        if index < rounds:
            steps += one_shot(first + index, slots)[:4]
        if index >= 1:
            steps += one_shot(first + index - 1, slots)[4:]
    return steps


def exchange(first: int, rounds: int, slots: int) -> list[Step]:
    """All-to-all: a first round that tells what everybody gives, in one place that is used every time."""
    given = ("given", 0)
    told = [
        Step("begin", writes=given, round=first),
        Step("end", writes=given, round=first),
        Step("raise", STAGED, first + 1),
        Step("wait", STAGED, first + 1),
        Step("begin", reads=given, round=first),
        Step("end", reads=given, round=first),
        Step("raise", REDUCED, first + 1),
        Step("raise", GATHERED, first + 1),
    ]
    return told + scatter(first + 1, rounds - 1, slots)


def program(operations: Iterable[tuple[str, int]], slots: int) -> list[Step]:
    """The steps of operations one after the other: (``one_shot``, 1), (``in_chunks``, 3) and so on."""
    steps: list[Step] = []
    first = 0
    for name, rounds in operations:
        if name == "one_shot":
            steps += one_shot(first, slots)
        elif name == "barrier":
            steps += barrier(first, slots)
        elif name == "in_chunks":
            steps += in_chunks(first, rounds, slots)
        elif name == "exchange":
            steps += exchange(first, rounds, slots)
        else:
            steps += scatter(first, rounds, slots)
        first += rounds
    return steps


class Model:
    """Some ranks that take the same steps."""

    def __init__(self, steps: Sequence[Step], ranks: int) -> None:
        self.steps = steps
        self.ranks = ranks
        # by number of steps taken: the flags, the round in each slot, and which step is half done
        self._flags: list[dict[str, int]] = [{STAGED: 0, REDUCED: 0, GATHERED: 0}]
        self._slots: list[dict[tuple[str, int], int]] = [{}]
        for step in steps:
            flags, slots = dict(self._flags[-1]), dict(self._slots[-1])
            if step.kind == "raise":
                assert step.rounds == flags[step.flag] + 1, "every round raises every flag, in order"
                flags[step.flag] = step.rounds
            if step.writes is not None:
                slots[step.writes] = step.round if step.kind == "end" else -2  # half written
            self._flags.append(flags)
            self._slots.append(slots)

    def _may(self, state: tuple[int, ...], rank: int) -> bool:
        if state[rank] == len(self.steps):
            return False
        step = self.steps[state[rank]]
        if step.kind != "wait":
            return True
        others = (self._flags[state[other]][step.flag] for other in range(self.ranks) if other != rank)
        return all(flag >= step.rounds for flag in others)

    def _fault(self, state: tuple[int, ...], rank: int) -> str:
        """What is wrong with the step that a rank takes here: it reads something else than it should."""
        step = self.steps[state[rank]]
        if step.reads is None:
            return ""
        for other in range(self.ranks):
            if other != rank and (found := self._slots[state[other]].get(step.reads, -1)) != step.round:
                what = "half of" if found == -2 else f"round {found} in"
                return (
                    f"rank {rank} reads {what} {step.reads} of rank {other}, not round {step.round}: {state}"
                )
        return ""

    def check(self) -> str:
        """The first fault that any order of steps leads to; empty if there is none and all always end.

        A read is checked at its begin and at its end; a write that begins and ends between is seen, too,
        since what it leaves is of another round.
        """
        start = (0,) * self.ranks
        seen, frontier = {start}, [start]
        while frontier:
            state = frontier.pop()
            moved = False
            for rank in range(self.ranks):
                if not self._may(state, rank):
                    continue
                moved = True
                if fault := self._fault(state, rank):
                    return fault
                after = (*state[:rank], state[rank] + 1, *state[rank + 1 :])
                if after not in seen:
                    seen.add(after)
                    frontier.append(after)
            if not moved and any(done < len(self.steps) for done in state):
                return f"all ranks wait for each other: {state}"
        return ""


@dataclass(frozen=True)
class Sleep:
    """A rank that raises a flag and ranks that may sleep until it is raised; stores may be delayed.

    The poster stores the flag, then (after a fence) looks for sleepers and wakes them. A sleeper counts
    itself as one, reads the flag again, and asks the kernel to sleep if it still has that value. A processor
    may keep a store to itself while it already reads: only a fence, or an operation that reads and writes at
    once, makes it wait. Without the fence the poster misses a sleeper that misses the flag.

    Attributes:
        fence: whether the poster has it.
        sleepers: number of ranks that wait.
    """

    fence: bool = True
    sleepers: int = 1

    def check(self) -> str:
        """A fault that some order of steps leads to: somebody sleeps for ever."""
        # poster: step, whether its store is still its own; memory: flag, sleepers; each sleeper's step
        start = (0, False, 0, 0, ("read",) * self.sleepers)
        seen, frontier = {start}, [start]
        while frontier:
            state = frontier.pop()
            following = list(self._after(state))
            if not following and any(step != "done" for step in state[4]):
                return f"a rank sleeps although the flag is raised: {state}"
            for one in following:
                if one not in seen:
                    seen.add(one)
                    frontier.append(one)
        return ""

    def _after(
        self, state: tuple[int, bool, int, int, tuple[str, ...]]
    ) -> Iterable[tuple[int, bool, int, int, tuple[str, ...]]]:
        step, kept, flag, count, ranks = state
        if step == 0:
            yield 1, True, flag, count, ranks  # stored, seen by nobody else yet
        if kept:
            yield step, False, 1, count, ranks
        if step == 1 and not (self.fence and kept):  # look for sleepers
            yield (2 if count else 3), kept, flag, count, ranks
        if step == 2:  # wake: the kernel sees all stores before
            woken = tuple("read" if rank == "asleep" else rank for rank in ranks)
            yield 3, False, 1, count, woken
        for index, rank in enumerate(ranks):

            def to(now: str, index: int = index) -> tuple[str, ...]:
                return (*ranks[:index], now, *ranks[index + 1 :])

            if rank == "read":
                yield step, kept, flag, count + 1, to("counted")
            elif rank == "counted":
                yield step, kept, flag, count, to("leaving" if flag else "sleepy")
            elif rank == "sleepy":  # the kernel compares and puts to sleep at once
                yield step, kept, flag, count, to("leaving" if flag else "asleep")
            elif rank == "leaving":
                yield step, kept, flag, count - 1, to("done")
