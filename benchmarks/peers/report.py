"""What was measured, as numbers and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .rounds import Outcome
from .shapes import Case

QUIET = 0.05
"""Share of the cores that other programs may take before the report says so."""
FAST, PLAIN = "colrow", "single_1_thread"
Outcomes = Mapping[str, Outcome]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def ratio(of: Outcome, to: Outcome) -> Spread | None:
    """Step time of one system over another's, of each round in which both had a turn."""
    pairs = list(zip(of.turns, to.turns, strict=False))
    return Spread.of([one.milliseconds / other.milliseconds for one, other in pairs]) if pairs else None


def step_time(outcome: Outcome) -> Spread | None:
    return Spread.of([turn.milliseconds for turn in outcome.turns]) if outcome.turns else None


def results(measured: Mapping[Case, Outcomes]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{shape: {system: {median_ms, cpu_ms, peak_mb, bytes, collectives, error}}}``; null: not measured.

    Milliseconds and CPU milliseconds of one step, the latter the mean of the ranks; megabytes of the rank
    that took most, above its interpreter; collectives and bytes per step of one rank.
    """
    return {
        case.key: {name: _result(outcome) for name, outcome in outcomes.items()}
        for case, outcomes in measured.items()
    }


def _result(outcome: Outcome) -> dict[str, Any]:
    time = step_time(outcome)
    cpu = statistics.median(turn.cpu_milliseconds for turn in outcome.turns) if outcome.turns else None
    return {
        "median_ms": time.median if time else None,
        "cpu_ms": cpu,
        "peak_mb": outcome.peak_mb,
        "bytes": outcome.bytes,
        "collectives": outcome.collectives,
        "error": outcome.error or None,
    }


def details(measured: Mapping[Case, Outcomes], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything: each round, the losses, the ratios, and what the numbers depend on."""
    cases = {}
    for case, outcomes in measured.items():
        systems = {}
        for name, outcome in outcomes.items():
            ratios = {other: ratio(outcome, outcomes[other]) for other in outcomes if other != name}
            found = {other: asdict(spread) for other, spread in ratios.items() if spread is not None}
            systems[name] = {**asdict(outcome), "ratio_to": found}
        cases[case.key] = {"title": case.title, **case.to_json(), "systems": systems}
    return {"about": dict(about), "cases": cases}


def markdown(measured: Mapping[Case, Outcomes], about: Mapping[str, Any]) -> str:
    """A table for each case, after what the numbers depend on."""
    lines = ["# Side by side", "", *_introduction(measured, about)]
    for case, outcomes in measured.items():
        lines += ["", f"## {case.key}", "", f"{case.title}.", "", *_table(outcomes)]
        lines += _remarks(outcomes)
    return "\n".join(lines) + "\n"


def _introduction(measured: Mapping[Case, Outcomes], about: Mapping[str, Any]) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in about.items())
    lines = [
        f"{settings}.",
        "",
        "One training step: forward, backward, AdamW. Medians and quartiles over rounds; the ratio is "
        "colrow's time over the row's, round by round. CPU is the mean of the ranks, memory the most that a "
        "rank took above its interpreter with everything imported; collectives and their payload are those "
        "of one rank. `limit` is colrow's plan with communication removed.",
    ]
    share = busy_elsewhere(measured)
    if share is not None and share > QUIET:
        lines += ["", f"**Not quiet**: other programs took {share:.0%} of the cores meanwhile."]
    return lines


def busy_elsewhere(measured: Mapping[Case, Outcomes]) -> float | None:
    """The mean share of the cores that other programs took; ``None`` if unknown."""
    turns = [
        turn for outcomes in measured.values() for outcome in outcomes.values() for turn in outcome.turns
    ]
    shares = [turn.elsewhere for turn in turns if turn.elsewhere is not None]
    return statistics.fmean(shares) if shares else None


def _table(outcomes: Outcomes) -> list[str]:
    """A row for each system; a column of ratios for each way in which colrow was run."""
    ours = [name for name in outcomes if name.split("[")[0] == FAST and outcomes[name].turns]
    head = ["system", "step, ms", "CPU ms per rank", "peak MB per rank", "collectives", "payload, MB"]
    head += [f"{name} / it" for name in ours]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, outcome in outcomes.items():
        result, time = _result(outcome), step_time(outcome)
        payload = None if outcome.bytes is None else outcome.bytes / 1e6
        digits = 1 if time is None or time.median >= 10 else 2
        ratios = [None if name == our else ratio(outcomes[our], outcome) for our in ours]
        rows.append(
            [
                f"{name} *" if outcome.error else name,
                "" if time is None else time.text(digits),
                _number(result["cpu_ms"], digits),
                _number(outcome.peak_mb, 0),
                _number(outcome.collectives, 0),
                _number(payload, 3 if payload is not None and payload < 1 else 1),
                *("" if one is None else one.text(2) for one in ratios),
            ]
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _remarks(outcomes: Outcomes) -> list[str]:
    errors = [f"- {name} *: {one_line(outcome.error)}" for name, outcome in outcomes.items() if outcome.error]
    notes = [f"- {name}: {'; '.join(outcome.notes)}" for name, outcome in outcomes.items() if outcome.notes]
    return ["", *errors, *notes] if errors or notes else []


def one_line(text: str, length: int = 300) -> str:
    """A text in one line of a table, cut if it is long."""
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= length else f"{flat[: length - 3]}..."
