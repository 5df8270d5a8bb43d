"""One case: all systems started, their losses compared, then measured in turns.

The processes of all systems live throughout; while one system has its turn the others wait for a request and
use no core. Every round gives each system a turn, beginning with another one each time. A ratio is taken
between turns of one round, which lie seconds apart, so that a machine that is slower for a while slows both.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .group import Ranks, SystemFailure
from .shapes import TOLERANCES, Case
from .systems import REFERENCE, System

LOSS_STEPS = 3
"""Steps before the first round, whose losses are compared: they depend on weights, gradients and updates."""
UNCOUNTED = 1
"""Steps at the start of a turn that only bring back caches and pages, and are not counted."""

SAID = "colrow: "
"""How the lines begin in which colrow says what it has chosen: transport, matrix library."""


@dataclass
class Turn:
    """One system's steps in one round: medians over steps; of several ranks the slowest, for CPU the mean.

    Attributes:
        elsewhere: the share of all cores that other programs took meanwhile; ``None`` if unknown.
    """

    milliseconds: float
    cpu_milliseconds: float
    elsewhere: float | None


@dataclass
class Outcome:
    """All that is known of one system in one case.

    Attributes:
        error: why it has no numbers, or why they do not compare; empty if all is well.
        notes: what it says of itself.
        losses: of the first steps.
        turns: by round; a system that fails has fewer than there were rounds.
        peak_mb: most memory of a rank above that of its interpreter with everything imported.
        collectives: per step and rank, and so ``bytes``.
    """

    error: str = ""
    notes: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    peak_mb: float | None = None
    collectives: int | None = None
    bytes: int | None = None


Start = Callable[[System, Case], Ranks]
Say = Callable[[str], None]


def run_case(
    case: Case, systems: Sequence[System], rounds: int, steps: int | None, start: Start, say: Say
) -> dict[str, Outcome]:
    """What came of each system, by name. A system that fails is left out from then on.

    Args:
        case: what to do.
        systems: who does it.
        rounds: turns of each system.
        steps: counted steps of a turn; default: the shape's own number.
        start: starts the processes of a system.
        say: is told what happens.
    """
    outcomes = {system.name: Outcome() for system in systems}
    running: dict[str, Ranks] = {}

    def attempt(name: str, action: Callable[[Ranks, Outcome], None]) -> None:
        try:
            action(running[name], outcomes[name])
        except SystemFailure as failure:
            outcomes[name].error = str(failure)
            say(f"{name}: {failure}")
            running.pop(name).close()

    try:
        for system in systems:
            say(f"starting {system.name}")
            running[system.name] = start(system, case)
            attempt(system.name, _begin)
        compare_losses(case, systems, outcomes)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            names = [system.name for system in systems]
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if name in running:
                    attempt(name, lambda ranks, outcome: _take_turn(ranks, outcome, steps or case.shape.turn))
        for name in list(running):
            attempt(name, _end)
    finally:
        for ranks in running.values():
            ranks.close()
    return outcomes


def _begin(ranks: Ranks, outcome: Outcome) -> None:
    outcome.notes = ranks.ask("build")[0]["notes"]
    outcome.losses = ranks.ask("steps", count=LOSS_STEPS)[0]["losses"]
    outcome.notes += [line.removeprefix(SAID) for line in ranks.printed(SAID)]


def _take_turn(ranks: Ranks, outcome: Outcome, steps: int) -> None:
    busy_before, begin = busy_seconds(), time.perf_counter()
    answers = ranks.ask("steps", count=steps + UNCOUNTED)
    seconds, busy_after = time.perf_counter() - begin, busy_seconds()
    elsewhere = None
    if busy_before is not None and busy_after is not None:
        own = sum(answer["cpu_total"] for answer in answers)
        elsewhere = max(0.0, busy_after - busy_before - own) / (seconds * (os.cpu_count() or 1))
    outcome.turns.append(summarise(answers, elsewhere))


def summarise(answers: Sequence[dict[str, Any]], elsewhere: float | None) -> Turn:
    """A turn from the answers of all ranks: their step is as long as the slowest rank's."""
    slowest = [max(of_ranks) for of_ranks in zip(*(answer["seconds"] for answer in answers), strict=True)]
    cpu = statistics.fmean(statistics.median(answer["cpu_seconds"][UNCOUNTED:]) for answer in answers)
    return Turn(statistics.median(slowest[UNCOUNTED:]) * 1e3, cpu * 1e3, elsewhere)


def _end(ranks: Ranks, outcome: Outcome) -> None:
    answers = ranks.ask("report")
    outcome.peak_mb = max(answer["peak_mb"] for answer in answers)
    outcome.collectives = max(answer["collectives"] for answer in answers)
    outcome.bytes = max(answer["bytes"] for answer in answers)


def compare_losses(case: Case, systems: Sequence[System], outcomes: dict[str, Outcome]) -> None:
    """Say of each system that does not compute the reference's losses that it trains a different model."""
    present = {system.name: outcomes[system.name] for system in systems if outcomes[system.name].losses}
    meaning = [system.name for system in systems if system.computes_the_model and system.name in present]
    if not meaning:
        return
    name = REFERENCE if REFERENCE in meaning else meaning[0]
    reference = present[name].losses
    for other in meaning:
        for step, (loss, expected) in enumerate(zip(present[other].losses, reference, strict=True)):
            # written so that a loss that is no number differs too
            if not abs(loss - expected) <= TOLERANCES[case.dtype] * abs(expected):
                where = f"loss {loss:.6f} at step {step + 1}, that of {name} is {expected:.6f}"
                present[other].error = f"different model: {where}"
                break


def busy_seconds() -> float | None:
    """CPU seconds that all programs together, and other machines on the same host, have taken so far."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = [int(value) for value in counters.read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
