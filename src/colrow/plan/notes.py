"""What a plan leaves whole, why, and what that costs: its notes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

from colrow.axes import Axes
from colrow.axes.factor import Reason
from colrow.plan.candidates import Candidate
from colrow.plan.choose import key
from colrow.plan.patterns import merge
from colrow.plan.selection import Chosen

SHOWN = 8
"""Modules that one note names."""


def notes_of(
    axes: Axes,
    candidates: Sequence[Candidate],
    chosen: Sequence[Chosen],
    banned: Mapping[str, Reason],
    parts: Iterable[str] = (),
) -> list[str]:
    """What stays whole, the largest first; then operators without a rule, and what the trace had to guess.

    Args:
        parts: where a forward leaves parts of values.
    """
    sizes = {
        value.source.name: prod(value.shape)
        for value in axes.trace.values
        if value.source.kind == "parameter"
    }
    used = {
        value.source.name for value in axes.trace.values if value.source.kind == "parameter" and value.uses
    }
    covered = {name for one in chosen for name, _ in one.candidate.outer.parameters}
    notes = _whole(candidates, banned, {name: sizes[name] for name in used - covered}, sum(sizes.values()))
    notes += _unused({name: size for name, size in sizes.items() if name not in used}, used, sizes)
    notes += [f"{label} gets this rank's part of what was whole" for label in parts]
    for name, operations in axes.unknown.items():
        notes.append(f"no rule for {name} ({len(operations)} times): its dimensions stay whole")
    return notes + axes.trace.warnings


def _whole(
    candidates: Sequence[Candidate], banned: Mapping[str, Reason], left: Mapping[str, int], total: int
) -> list[str]:
    """Axes of parameters that are cut along none."""
    sizes: dict[str, int] = defaultdict(int)
    reasons: dict[str, Reason] = {}
    counted: set[tuple[str, str]] = set()
    for candidate in candidates:
        label = key(candidate)
        reason = banned.get(label) or next(iter(candidate.illegal), None)
        for value, _ in candidate.outer.members if reason is not None else ():
            name = value.source.name
            if value.source.kind == "parameter" and name in left and (label, name) not in counted:
                counted.add((label, name))
                sizes[label] += left[name]
                reasons.setdefault(label, reason or Reason(""))
    return [
        f"{label} stays whole, with {sizes[label] / total:.2%} of all parameters: {reasons[label]}"
        for label in sorted(sizes, key=lambda one: -sizes[one])
    ]


def _unused(unused: Mapping[str, int], used: Collection[str], sizes: Mapping[str, int]) -> list[str]:
    """Parameters that no example reads, by the largest modules that hold nothing else."""
    if not unused:
        return []
    busy = {prefix for name in used for prefix in _prefixes(name)}
    found: dict[str, int] = defaultdict(int)
    for name, size in unused.items():
        holder = next((prefix for prefix in _prefixes(name) if prefix not in busy), name)
        found[holder] += size
    ordered = sorted(found, key=lambda one: -found[one])
    names = [merged.text for merged, _ in merge((name, 0) for name in ordered)]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [
        f"{', '.join(names[:SHOWN])}{more}, with {sum(unused.values()) / sum(sizes.values()):.2%} of all "
        "parameters, stay whole: no example uses them. Give an example that does"
    ]


def _prefixes(name: str) -> Iterable[str]:
    """The modules that a parameter is in, from the outermost."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))
