"""A plan as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod
from textwrap import wrap
from typing import TYPE_CHECKING

from colrow.plan.patterns import Merged, merge, merge_texts
from colrow.plan.places import ModuleInput
from colrow.plan.text import columns, counts, shape, size

if TYPE_CHECKING:
    from colrow.plan.plan import Along, Axis, Entry, Plan, SequenceGather, Sharding

WIDTH = 120
"""Notes are broken into lines of so many characters."""


def explain(plan: Plan) -> str:
    """Axes with their members and what they save and cost, collectives, actions, and what stayed whole."""
    lines = [f"plan over {plan.ranks} {'ranks' if plan.ranks > 1 else 'rank'}: {_held(plan)}"]
    for title, section in (
        ("axes", _axes(plan)),
        ("what each rank holds", _ranks(plan)),
        ("collectives", _collectives(plan)),
        ("actions", _actions(plan)),
        ("numbers that become each rank's own", _numbers(plan)),
        ("notes", [line for note in merge_texts(plan.notes) for line in _wrapped(note)]),
    ):
        if section:
            lines += ["", title, *section]
    return "\n".join(lines)


def _wrapped(note: Merged) -> list[str]:
    return wrap(
        f"{note}{f' (x {note.count})' if note.count > 1 else ''}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
    )


def _held(plan: Plan) -> str:
    if not plan.axes:
        return "nothing is cut"
    names = ", ".join(plan.axes)
    return f"{len(plan.parameters)} parameters are cut along {names}"


def _axes(plan: Plan) -> list[str]:
    if not plan.axes:
        return []
    head = ("axis", "units", "per rank", "parameters", "saved per rank", "collectives")
    rows = [head]
    for axis in plan.axes.values():
        members = [
            name
            for name, sharding in plan.parameters.items()
            if sharding.axis == axis.name and name not in plan.ties
        ]
        whole = sum(prod(plan.shapes.get(name, ())) for name in members if name in plan.shapes)
        saved = [whole - sum(_local(plan, name, rank) for name in members) for rank in range(plan.ranks)]
        rows.append(
            (
                axis.name,
                str(axis.cut.units),
                counts(axis.cut.counts),
                size(whole, "") if whole else f"{len(members)} tensors",
                _range([_bytes(plan, one) for one in saved]) if whole else "",
                _collectives_of(plan, axis),
            )
        )
    return [*columns(rows, right=(1,)), "", *_members(plan)]


def _local(plan: Plan, name: str, rank: int) -> int:
    if name not in plan.shapes:
        return 0
    return plan.tensor_layout(name, plan.shapes[name]).local_numel(rank)


def _bytes(plan: Plan, elements: float) -> str:
    """Elements as bytes, where the size of one is known."""
    if plan.prediction is None or not plan.prediction.parameters[0]:
        return size(elements, "")
    return size(elements * plan.prediction.parameter_bytes[0] / plan.prediction.parameters[0])


def _range(texts: Sequence[str]) -> str:
    """What all ranks have alike, or the first and last of the different texts."""
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} .. {texts[-1]}"


def _collectives_of(plan: Plan, axis: Axis) -> str:
    """Numbers of collectives in one step whose place is a module that holds members of the axis."""
    if plan.prediction is None:
        return ""
    members = {
        merged.text
        for merged in merge_texts(n for n, one in plan.parameters.items() if one.axis == axis.name)
    }
    mode = _first_mode(plan)
    found: Counter[str] = Counter()
    for one in plan.prediction.collectives:
        action, _, path = one.label.partition(" ")
        if one.mode == mode and any(_starts(member, path) for member in members):
            found[f"{action} {one.direction}"] += one.count
    return ", ".join(f"{count} {what}" for what, count in found.items())


def _starts(member: str, path: str) -> bool:
    """Whether a parameter lies in a module; ``*`` stands for any number in either."""
    names, parts = member.split("."), path.split(".")
    pairs = zip(names, parts, strict=False)
    return len(parts) <= len(names) and all(
        one == other or (other == "*" and one.isdigit()) for one, other in pairs
    )


def _first_mode(plan: Plan) -> str:
    collectives = plan.prediction.collectives if plan.prediction is not None else ()
    return next((one.mode for one in collectives), "")


def _members(plan: Plan) -> list[str]:
    """The cut tensors of every axis, alike ones of repeated layers together."""
    lines = []
    for axis in plan.axes.values():
        lines.append(f"  {axis.name}")
        tensors = [*plan.parameters.items(), *plan.buffers.items()]
        texts = [
            (_member(plan, name, sharding), _layout(sharding), plan.shapes.get(name, ()))
            for name, sharding in tensors
            if sharding.axis == axis.name
        ]
        rows = [
            (str(merged), _times(merged), layout, shape(sizes) if sizes else "")
            for merged, (layout, sizes) in merge((text, (layout, sizes)) for text, layout, sizes in texts)
        ]
        lines += columns(rows, right=(1,), indent="    ")
    return lines


def _member(plan: Plan, name: str, sharding: Sharding) -> str:
    tied = f" (tied to {plan.ties[name]})" if name in plan.ties else ""
    return f"{name}[{sharding.dimension}]{tied}"


def _times(merged: Merged) -> str:
    return f"x {merged.count}" if merged.count > 1 else ""


def _layout(sharding: Sharding) -> str:
    """How units lie in the dimension: ``32 units of 128``, ``[12 units of 64 | ...]``."""
    parts = []
    for one in sharding.layout.segments:
        text = "whole " + str(one.size) if one.whole else f"{one.units} units of {one.inner}"
        if one.span > 1 and not one.whole:
            text = f"{one.units} units of {one.inner}, each for {one.span}"
        parts.append(f"{one.outer} x ({text})" if one.outer > 1 and not one.whole else text)
    runs = Counter(parts)
    if len(parts) > 1 and len(runs) == 1:
        return f"{len(parts)} times {parts[0]}"
    return " | ".join(parts)


def _ranks(plan: Plan) -> list[str]:
    prediction = plan.prediction
    if prediction is None:
        if not plan.shapes:
            return []
        names = [name for name in plan.shapes if name not in plan.buffers and name not in plan.ties]
        whole = sum(prod(plan.shapes[name]) for name in names)
        each = [sum(_local(plan, name, rank) for name in names) for rank in range(plan.ranks)]
        return _share_table([("elements", whole, each, "")])
    return _share_table(
        [("parameters", *prediction.parameters, ""), ("bytes", *prediction.parameter_bytes, "B")]
    )


def _share_table(quantities: Iterable[tuple[str, int, Sequence[int], str]]) -> list[str]:
    rows = [("", "whole", "per rank", "share")]
    for name, whole, each, unit in quantities:
        shares = [f"{100 * one / whole:.1f} %" if whole else "" for one in each]
        rows.append(
            (name, size(whole, unit), _per_rank([size(one, unit) for one in each]), _per_rank(shares))
        )
    return columns(rows)


def _per_rank(texts: Sequence[str]) -> str:
    if len(set(texts)) == 1:
        return texts[0]
    if len(texts) <= 4:
        return ", ".join(texts)
    return f"{texts[0]} .. {texts[-1]}"


def _collectives(plan: Plan) -> list[str]:
    if plan.prediction is None:
        return []
    rows = [("mode", "pass", "collective", "where", "shape", "bytes", "count", "total")]
    totals: dict[str, list[int]] = {}
    modes = list(dict.fromkeys(one.mode for one in plan.prediction.collectives))
    for one in sorted(
        plan.prediction.collectives, key=lambda one: (modes.index(one.mode), one.direction == "backward")
    ):
        total = one.bytes * one.count
        rows.append(
            (
                one.mode,
                one.direction,
                one.kind,
                one.label,
                shape(one.shape),
                size(one.bytes),
                f"about {one.count}" if one.varies else str(one.count),
                size(total),
            )
        )
        sums = totals.setdefault(one.mode, [0, 0])
        sums[0] += one.count
        sums[1] += total
    if len(rows) == 1:
        return ["  none"]
    return columns(rows, right=(5, 6, 7)) + [
        f"  {mode}: {count} collectives of {size(total)} together" for mode, (count, total) in totals.items()
    ]


def _actions(plan: Plan) -> list[str]:
    loss = plan.loss
    vocabulary_loss = []
    if loss is not None:
        kept = "" if loss.fused else ", of all logits at once"
        vocabulary_loss.append(f"{loss.logits} of {loss.module or 'the model'}, cut {loss.axis}{kept}")
    kinds: list[tuple[str, list[str]]] = [
        ("entry: all-reduce backward", [_entry(one) for one in plan.entries]),
        ("exit: all-reduce forward", [str(one.place) for one in plan.exits if one.along is None]),
        (
            "exit: reduce-scatter forward",
            [f"{one.place}, {_along(one.along)}" for one in plan.exits if one.along is not None],
        ),
        (
            "lookup: all-reduce forward",
            [f"{one.place}, cut {one.axis}" for one in plan.lookups if one.along is None],
        ),
        (
            "lookup: reduce-scatter",
            [
                f"{one.place}, cut {one.axis}, {_along(one.along)}"
                for one in plan.lookups
                if one.along is not None
            ],
        ),
        (
            "entry: all-gather forward",
            [
                f"{_entry(one)}, {_along(one.along)}"
                for one in plan.sequence_gathers
                if one.gradient == "partial"
            ],
        ),
        (
            "whole sequence: all-gather",
            [
                f"{_entry(one)}, {_along(one.along)}"
                for one in plan.sequence_gathers
                if one.gradient == "whole"
            ],
        ),
        ("part kept for backward", [path for one in plan.sequence_gathers for path in one.again]),
        ("part of a sequence", [f"{one.place}, {_along(one.along)}" for one in plan.sequence_slices]),
        ("slice: own part", [f"{one.place}, cut {one.sharding.axis}" for one in plan.slices]),
        ("gather: all parts", [f"{one.place}, cut {one.sharding.axis}" for one in plan.gathers]),
        ("gradients summed", [one.name for one in plan.partial_parameters]),
        ("added by one rank", [one.name for one in plan.once_parameters]),
        ("own random numbers", [one.module or "the model" for one in plan.randomness]),
        ("loss over the vocabulary", vocabulary_loss),
        ("hold a tied parameter", list(plan.holders)),
    ]
    rows = []
    for kind, texts in kinds:
        for number, merged in enumerate(merge_texts(texts)):
            rows.append((kind if number == 0 else "", _times(merged), str(merged)))
    return columns(rows, right=(1,)) if rows else []


def _along(along: Along) -> str:
    return f"{along.sequence} in dimension {along.dimension}"


def _entry(entry: Entry | SequenceGather) -> str:
    parents = {place.module.rpartition(".")[0] for place in entry.places}
    inputs = {place.path if isinstance(place, ModuleInput) else None for place in entry.places}
    if len(entry.places) > 1 and len(parents) == 1 and len(inputs) == 1 and None not in inputs:
        first, parent = entry.places[0], parents.pop()
        names = ", ".join(place.module.rpartition(".")[2] for place in entry.places)
        text = str(first).removesuffix(first.module)
        return f"{text}{parent}.{{{names}}}" if parent else f"{text}{{{names}}}"
    return ", ".join(str(place) for place in entry.places)


def _numbers(plan: Plan) -> list[str]:
    attributes = [
        (f"{one.module or 'the model'}.{one.attribute}", counts(one.values)) for one in plan.attributes
    ]
    integers = [(str(one.place), f"{counts(one.given)} -> {counts(one.values)}") for one in plan.integers]
    rows = [
        (kind, str(merged), values, _times(merged))
        for kind, found in (("attribute", attributes), ("call", integers))
        for merged, values in merge(found)
    ]
    return columns(rows) if rows else []
