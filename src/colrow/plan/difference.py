"""What two plans, or a plan and a model, do not have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from colrow.errors import PlanError
from colrow.plan.patterns import merge
from colrow.plan.text import columns, counts, shape

if TYPE_CHECKING:
    from torch import nn

    from colrow.plan.plan import Along, Axis, Loss, Plan, Sharding

SHOWN = 20
"""So many kinds of names are listed in an error."""


def check_model(plan: Plan, model: nn.Module) -> None:
    """Compare the shapes that a plan was made for with a model's parameters and buffers.

    A plan without shapes fits every model. Buffers are compared if the plan knows any.

    Raises:
        PlanError: lists the names that the model lacks, those that it has in addition, and those of another
            shape; alike ones of repeated layers together.
    """
    if not plan.shapes:
        return
    buffers = {name: tuple(one.shape) for name, one in model.named_buffers(remove_duplicate=False)}
    present = {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}
    if buffers.keys() & plan.shapes.keys():
        present |= buffers
    rows = [
        *(
            (f"the model has no {name}", shape(size))
            for name, size in plan.shapes.items()
            if name not in present
        ),
        *(
            (f"the plan does not know {name}", shape(size))
            for name, size in present.items()
            if name not in plan.shapes
        ),
        *(
            (f"{name} differs", f"{shape(plan.shapes[name])} in the plan, {shape(size)} in the model")
            for name, size in present.items()
            if name in plan.shapes and plan.shapes[name] != size
        ),
    ]
    if not rows:
        return
    merged = [f"{text} ({sizes})" + _times(text.count) for text, sizes in merge(rows)]
    more = f"\n  and {len(merged) - SHOWN} more" if len(merged) > SHOWN else ""
    raise PlanError(
        "",
        f"the plan was made for another model, {len(rows)} parameters or buffers differ:\n  "
        + "\n  ".join(merged[:SHOWN])
        + more,
        "Derive a plan for this model, or build the model that the plan was made for.",
    )


def diff(plan: Plan, other: Plan) -> str:
    """What is to be taken from ``plan`` (``-``), added (``+``) or changed (``~``) to make it ``other``.

    Empty if the two are equal. Alike lines of repeated layers are together, with their number.
    """
    lines: list[str] = []
    if plan.ranks != other.ranks:
        lines += ["ranks", f"  ~ {plan.ranks} -> {other.ranks}"]
    for title, one, two in zip(_NAMED, _named(plan), _named(other), strict=True):
        lines += _section(title, _changes(one, two))
    for title, found, wanted in zip(_LISTED, _listed(plan), _listed(other), strict=True):
        lines += _section(title, _exchanged(found, wanted))
    if not lines and plan != other:
        lines.append("the order of actions differs")
    return "\n".join(lines)


_NAMED = ("axes", "parameters", "buffers", "attributes", "integers", "shapes", "ties", "predicted")
_LISTED = (
    "entries",
    "exits",
    "lookups",
    "slices",
    "gathers",
    "gathers of sequences",
    "parts of sequences",
    "gradients summed",
    "added by one rank",
    "own random numbers",
    "loss",
    "hold a tied parameter",
    "notes",
)


def _named(plan: Plan) -> Iterable[dict[str, str]]:
    yield {name: _axis(axis) for name, axis in plan.axes.items()}
    yield {name: _sharding(one) for name, one in plan.parameters.items()}
    yield {name: _sharding(one) for name, one in plan.buffers.items()}
    yield {f"{one.module or 'the model'}.{one.attribute}": counts(one.values) for one in plan.attributes}
    yield {str(one.place): f"{counts(one.given)} -> {counts(one.values)}" for one in plan.integers}
    yield {name: shape(sizes) for name, sizes in plan.shapes.items()}
    yield plan.ties
    yield _predicted(plan)


def _predicted(plan: Plan) -> dict[str, str]:
    prediction = plan.prediction
    if prediction is None:
        return {}
    held = {"parameters": prediction.parameters, "bytes": prediction.parameter_bytes}
    found = {name: f"{whole}, {counts(each)} per rank" for name, (whole, each) in held.items()}
    times: Counter[str] = Counter()
    for one in prediction.collectives:
        sizes = f"{shape(one.shape)} ({one.bytes} B)"
        times[f"{one.mode} {one.direction} {one.kind} {one.label} of {sizes}"] += one.count
    return found | {text: f"{count} times" for text, count in times.items()}


def _listed(plan: Plan) -> Iterable[Sequence[str]]:
    yield [", ".join(map(str, one.places)) for one in plan.entries]
    yield [f"{one.place}{_along(one.along)}" for one in plan.exits]
    yield [f"{one.place} along {one.axis}{_along(one.along)}" for one in plan.lookups]
    yield [f"{one.place} along {_sharding(one.sharding)}" for one in plan.slices]
    yield [f"{one.place} along {_sharding(one.sharding)}" for one in plan.gathers]
    yield [
        f"{', '.join(map(str, one.places))}{_along(one.along)}, gradient {one.gradient}"
        + (f", again for {', '.join(one.again)}" if one.again else "")
        for one in plan.sequence_gathers
    ]
    yield [f"{one.place}{_along(one.along)}" for one in plan.sequence_slices]
    yield [f"{one.name} read by {one.reader or 'the model'}" for one in plan.partial_parameters]
    yield [f"{one.name} read by {one.reader or 'the model'}" for one in plan.once_parameters]
    yield [one.module or "the model" for one in plan.randomness]
    loss = plan.loss
    yield [] if loss is None else [_loss(loss)]
    yield plan.holders
    yield plan.notes


def _along(along: Along | None) -> str:
    return "" if along is None else f" to parts of {along.sequence}[{along.dimension}]"


def _loss(loss: Loss) -> str:
    kept = "" if loss.fused else ", of all logits at once"
    return f"of {loss.module or 'the model'} on {loss.logits} along {loss.axis}, labels {loss.labels}{kept}"


def _axis(axis: Axis) -> str:
    text = f"{axis.cut.units} units cut {counts(axis.cut.counts)}"
    return f"{text}, fitted to {counts(axis.fitted)}" if axis.fitted not in ((), axis.cut.counts) else text


def _sharding(one: Sharding) -> str:
    segments = ", ".join(str(segment).removeprefix("Segment") for segment in one.layout.segments)
    return f"{one.axis}[{one.dimension}] {segments}"


def _changes(one: Mapping[str, str], two: Mapping[str, str]) -> list[tuple[str, tuple[str, str]]]:
    """Name, sign and text of what differs."""
    found = []
    for name in dict.fromkeys([*one, *two]):
        if name not in two:
            found.append((name, ("-", one[name])))
        elif name not in one:
            found.append((name, ("+", two[name])))
        elif one[name] != two[name]:
            found.append((name, ("~", f"{one[name]} -> {two[name]}")))
    return found


def _exchanged(one: Sequence[str], two: Sequence[str]) -> list[tuple[str, tuple[str, str]]]:
    removed, added = Counter(one) - Counter(two), Counter(two) - Counter(one)
    return [
        *((text, ("-", "")) for text in removed.elements()),
        *((text, ("+", "")) for text in added.elements()),
    ]


def _section(title: str, changes: list[tuple[str, tuple[str, str]]]) -> list[str]:
    if not changes:
        return []
    rows = [(sign, f"{merged}{_times(merged.count)}", text) for merged, (sign, text) in merge(changes)]
    return [title, *columns(rows)]


def _times(count: int) -> str:
    return f" x {count}" if count > 1 else ""
