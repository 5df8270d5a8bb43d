"""Comparisons of a program with the length of a sequence, which must come out as for the whole.

``if length > window`` takes another course on a rank's tokens than on all. That can only be told when the
length is known: at each call, before anything is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from colrow.errors import PlanError
from colrow.parallel.context.plan import Guard, Tokens
from colrow.parallel.context.token_axis import TokenAxis
from colrow.sources import short_path
from colrow.trace.integers import COMPARISON, Attribute, Expression, Size, evaluate, origins
from colrow.trace.records import Escape, Trace

_OPERATORS = ("aten.",)
_LENGTHS = (64, 1000, 4096)
"""A comparison that comes out otherwise on half the tokens at all of these is refused at once."""


def find_guards(trace: Trace, sequences: Sequence[TokenAxis], local: Mapping[int, int]) -> set[Guard]:
    """What must come out alike on a rank's tokens and on all.

    Args:
        trace: of all runs.
        sequences: of each run.
        local: the dimension of the tokens of each value that is cut, by its index.

    Raises:
        PlanError: if a number of tokens is used as a number, or a comparison never comes out alike.
    """
    found: dict[tuple[object, ...], Guard] = {}  # copies of a layer compare alike
    for escape in trace.escapes:
        if not any(isinstance(one, Size) for one in origins(escape.expression)):
            continue
        sizes = sizes_in(escape.expression, trace, sequences[_run_of(trace, escape)], local)
        if not any(one.is_local for one in sizes.values()):
            continue
        if escape.use.startswith(_OPERATORS) and not any(
            local.get(one.value_index) == one.dimension for one in sizes
        ):
            continue  # of arguments that are the same for each token: calls that get it are looked at
        place = f"{short_path(escape.site.file)}:{escape.site.line} in {escape.site.code.co_name}"
        module = "" if escape.module is None else escape.module.path
        if escape.use != COMPARISON:
            values = {number_at(escape.expression, sizes, tokens, 1000) for tokens in (100, 500, 1000)}
            if len(values) == 1:
                continue
            raise PlanError(
                module,
                f"the number of tokens is used as a number ({escape.use} at {place}), and would be a rank's",
                "Compute it from a number that is not a size of sequences, or do not cut these (cp=1).",
            )
        guard = Guard(escape.expression, tuple(sizes.items()), place)
        if all(guard.differs(length // 2, length) for length in _LENGTHS):
            raise PlanError(
                module,
                f"the program compares a rank's tokens with all ({guard})",
                "Compare sizes of one tensor, or do not cut sequences (cp=1).",
            )
        found[str(guard), tuple(sizes.values())] = guard
    return set(found.values())


def sizes_in(
    expression: Expression, trace: Trace, axis: TokenAxis, local: Mapping[int, int]
) -> dict[Size, Tokens]:
    """What the sizes in an expression are that depend on the length of the sequence."""
    found: dict[Size, Tokens] = {}
    for origin in origins(expression):
        if not isinstance(origin, Size):
            continue
        value = trace.values[origin.value_index]
        is_alike = origin.dimension in axis.alike_dimensions(value)
        if is_alike or origin.dimension in axis.dimensions(value):
            is_local = is_alike or local.get(origin.value_index) == origin.dimension
            factor = max(1, origin.value // axis.length)
            found[origin] = Tokens(is_local, factor, origin.value - factor * axis.length)
    return found


def number_at(expression: Expression, sizes: Mapping[Size, Tokens], tokens: int, length: int) -> int | None:
    """An expression's number on a rank with ``tokens`` of ``length``; ``None`` if it has none."""

    def number(origin: Attribute | Size) -> int:
        found = sizes.get(origin) if isinstance(origin, Size) else None
        return origin.value if found is None else found.number(tokens, length)

    try:
        return evaluate(expression, number)
    except ZeroDivisionError:
        return None


def _run_of(trace: Trace, escape: Escape) -> int:
    """The index of the run in which something happened."""
    values = [one.value_index for one in origins(escape.expression) if isinstance(one, Size)]
    producer = trace.values[max(values)].producer
    if producer is None:
        first = {value.index: run for run, (_, root) in enumerate(trace.runs) for _, value in root.inputs}
        return first.get(max(values), 0)
    return next(run for run, (_, root) in enumerate(trace.runs) if root.first <= producer.index < root.last)
