"""Plans as YAML files that a person can read and edit."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colrow.errors import PlanError
from colrow.plan.codec import Decoder, Encoder
from colrow.plan.repeat import compress, expand

if TYPE_CHECKING:
    from colrow.plan.plan import Plan

HEADER = """\
# A plan of colrow: what is cut over the ranks of a tensor-parallel group, and what they exchange where.
# colrow.Plan.load reads it, colrow.parallelize(model, mesh, plan) does what it says.
#
# axes         their units and how many of them each rank gets (cut); the counts may be edited, but where
#              attributes and integers were fitted to them, only together with these
# parameters,  by name: the axis, the dimension that is cut, and how the axis's units lie in it:
# buffers      "1x32x128" are 32 units of 128 indices; "outer x units x inner", parts one after the other
# entries      values that enter what is cut: all-reduce in the backward pass
# exits        partial sums: all-reduce in the forward pass; with "along", a rank gets its part of a sequence
# sequence_*   where parts of a sequence are gathered and taken
# calls        places in programs that the entries above and below name by a short word
# shapes       of the model that the plan is for; another model is refused
# repeat, each what is under each stands for all these numbers in place of the first * of its names
"""

_WIDTH = 10_000


def save(plan: Plan, path: str | PathLike[str]) -> None:
    """Write a plan to a YAML file, which :func:`load` reads back exactly."""
    Path(path).write_text(dumps(plan), encoding="utf-8")


def load(path: str | PathLike[str]) -> Plan:
    """Read a plan.

    Raises:
        PlanError: if the file does not hold one; names the entry at fault.
        FileNotFoundError: if there is no file.
    """
    return loads(Path(path).read_text(encoding="utf-8"), str(path))


def dumps(plan: Plan) -> str:
    """A plan as YAML text."""
    encoder = Encoder()
    data = encoder.plan(plan)
    if encoder.calls:
        data["calls"] = encoder.calls
    return "\n".join([HEADER.rstrip(), *_lines(data, ""), ""])


def loads(text: str, source: str = "the text") -> Plan:
    """The plan of a YAML text; ``source`` is named in errors.

    Raises:
        PlanError: as :func:`load`.
    """
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PlanError(source, f"this is not YAML ({error})", "Correct it.") from error
    if not isinstance(data, dict):
        raise PlanError(source, "this is no plan: it has no entries", "Write one with plan.save.")
    try:
        expanded = _expanded(data)
        return Decoder(expanded.pop("calls", {})).plan(expanded)
    except ValueError as error:
        cause = error.cause if isinstance(error, PlanError) else str(error)
        raise PlanError(source, cause, "Correct the file, or derive the plan anew.") from error


def _expanded(item: Any) -> Any:
    """The same entries with repeated records written out, however deep they stand."""
    if isinstance(item, dict):
        return {key: _expanded(value) for key, value in item.items()}
    if isinstance(item, list) and any(isinstance(one, dict) and "repeat" in one for one in item):
        return expand(item)
    return item


def _lines(data: dict[str, Any], indent: str) -> Iterator[str]:
    """One line for each record, repeated ones under what they are repeated for."""
    for key, value in data.items():
        name = f"{indent}{_flow(key)}:"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield name
            yield from _records(compress(value), indent)
        elif isinstance(value, list) and value and isinstance(value[0], str):
            yield name
            yield from (f"{indent}- {_flow(one)}" for one in value)
        elif isinstance(value, dict) and any(isinstance(one, dict | list) for one in value.values()):
            yield name
            yield from _lines(value, indent + "  ")
        else:
            yield f"{name} {_flow(value)}"


def _records(records: list[dict[str, Any]], indent: str) -> Iterator[str]:
    for record in records:
        if "repeat" in record:
            yield f"{indent}- repeat: {record['repeat']}"
            yield f"{indent}  each:"
            yield from _records(record["each"], indent + "  ")
        else:
            yield f"{indent}- {_flow(record)}"


def _flow(item: Any) -> str:
    """One line of YAML."""
    import yaml

    text: str = yaml.safe_dump(
        item, default_flow_style=True, sort_keys=False, width=_WIDTH, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
