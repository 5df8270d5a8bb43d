"""Repeated layers in a list of records: written once, with the numbers of the layers.

A run of records that occurs again and again with another number in its names becomes one record::

    - repeat: 0-125
      each:
      - {name: model.layers.*.mlp.up_proj.weight, axis: mlp, dimension: 0}
      - {name: model.layers.*.mlp.down_proj.weight, axis: mlp, dimension: 1}

``*`` stands for the number. Runs may hold runs: the outer number goes to the first ``*`` of a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from colrow.plan.patterns import ranges

LONGEST = 64
"""Runs of up to so many records are recognised."""

OFTEN = 3

_NUMBER = re.compile(r"(?<![^. ])[0-9]+(?![^.])")
_STAR = re.compile(r"(?<![^. ])\*(?![^.])")

Record = dict[str, Any]


def compress(records: list[Record]) -> list[Record]:
    """The same records with runs of alike ones written once. :func:`expand` gives them back exactly."""
    if any(_STAR.search(text) for record in records for text in _strings(record)):
        return records
    found, levels = records, 0
    while levels < 3:
        shorter = _pass(found)
        if len(shorter) == len(found) or expand(shorter) != records:
            break
        found, levels = shorter, levels + 1
    return found


def expand(records: list[Record]) -> list[Record]:
    """The records with all runs written out.

    Raises:
        ValueError: if a run is not written as it should be.
    """
    found: list[Record] = []
    for record in records:
        if not isinstance(record, dict) or "repeat" not in record:
            found.append(record)
            continue
        if set(record) != {"repeat", "each"} or not isinstance(record["each"], list):
            raise ValueError(f"a repetition has the two entries repeat and each, not {', '.join(record)}")
        for number in _numbers(str(record["repeat"])):
            put = partial(_STAR.sub, str(number), count=1)
            found += expand([_change(one, put) for one in record["each"]])
    return found


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        matched = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not matched:
            raise ValueError(f"repeat must be numbers and ranges such as 0-3, 5, not {text!r}")
        low = int(matched[1])
        yield from range(low, int(matched[2] or low) + 1)


def _pass(records: list[Record]) -> list[Record]:
    """One level of runs: at every record the shortest that occurs often, or else the one that covers most."""
    skeletons = [_change(record, lambda text: _NUMBER.sub("*", text)) for record in records]
    keys = [repr(one) for one in skeletons]
    found: list[Record] = []
    at = 0
    while at < len(records):
        best: tuple[int, list[Record], list[int]] | None = None
        for length in range(1, min(LONGEST, (len(records) - at) // 2) + 1):
            if keys[at] != keys[at + length]:
                continue
            run = _run(records, keys, at, length)
            if run is not None and (best is None or len(run[1]) * length > best[0]):
                best = (len(run[1]) * length, *run)
            if run is not None and len(run[1]) >= OFTEN:
                break
        if best is None:
            found.append(records[at])
            at += 1
        else:
            covered, template, numbers = best
            found.append({"repeat": ranges(numbers), "each": template})
            at += covered
    return found


def _run(
    records: list[Record], keys: list[str], at: int, length: int
) -> tuple[list[Record], list[int]] | None:
    """The template of a run of ``length`` records and the ascending numbers it occurs with, at least two."""
    first = records[at : at + length]
    numbers: list[int] = []
    template: list[Record] = []
    for start in range(at + length, len(records) - length + 1, length):
        if keys[start : start + length] != keys[at : at + length]:
            break
        matched = _match(first, records[start : start + length])
        if matched is None or (template and matched[0] != template):
            break
        template, low, high = matched
        if numbers and (numbers[0] != low or high <= numbers[-1]):
            break
        numbers = [low, high] if not numbers else [*numbers, high]
    return (template, numbers) if len(numbers) > 1 else None


def _match(one: list[Record], other: list[Record]) -> tuple[list[Record], int, int] | None:
    """The template of two lists of records that differ in one number, and its two values."""
    pairs: set[tuple[str, str]] = set()
    changed: list[tuple[str, str]] = []
    texts = zip(_strings(one), _strings(other), strict=True)
    for first, second in texts:
        places = zip(_NUMBER.finditer(first), _NUMBER.finditer(second), strict=True)
        different = [(a, b) for a, b in places if a[0] != b[0]]
        pairs.update((a[0], b[0]) for a, b in different)
        template = first
        for a, _ in reversed(different):
            template = template[: a.start()] + "*" + template[a.end() :]
        # a star inside a run comes after the outer one, or it would take the outer number
        if different and "*" in first[: different[-1][0].start()]:
            return None
        if len(different) > 1:
            return None
        changed.append((first, template))
    if len(pairs) != 1:
        return None
    low, high = next(iter(pairs))
    if str(int(low)) != low or str(int(high)) != high:
        return None
    texts_of_template = iter(template for _, template in changed)
    return [_change(record, lambda _: next(texts_of_template)) for record in one], int(low), int(high)


def _strings(item: Any) -> Iterator[str]:
    """All strings of a nesting in a fixed order, except for keys and for ``repeat``."""
    if isinstance(item, str):
        yield item
    elif isinstance(item, dict):
        for key, value in item.items():
            if key != "repeat":
                yield from _strings(value)
    elif isinstance(item, list):
        for one in item:
            yield from _strings(one)


def _change(item: Any, change: Callable[[str], str]) -> Any:
    """The same nesting with its strings changed, in the order of :func:`_strings`."""
    if isinstance(item, str):
        return change(item)
    if isinstance(item, dict):
        return {key: value if key == "repeat" else _change(value, change) for key, value in item.items()}
    if isinstance(item, list):
        return [_change(one, change) for one in item]
    return item
