"""From a trace to its axes: run the rule of every operation."""

from __future__ import annotations

from colrow.axes.constants import Constants, make_anew
from colrow.axes.context import Dimensions, Marks, RuleContext
from colrow.axes.factors import Factors
from colrow.axes.registry import Registry
from colrow.axes.result import Axes
from colrow.axes.rules.default import default_registry
from colrow.trace.records import Operation, Trace, Value


def infer(trace: Trace, registry: Registry | None = None) -> Axes:
    """What the dimensions of all values of ``trace`` are made of, and which may be sharded.

    Args:
        trace: one run of a model; not modified.
        registry: the rules of operators; by default :func:`default_registry`. An operator without a rule
            has all its dimensions blocked and is listed in :attr:`Axes.unknown`.
    """
    registry = default_registry() if registry is None else registry
    factors, marks = Factors(), Marks()
    table: dict[int, Dimensions] = {}
    unknown: dict[str, list[Operation]] = {}

    def dimensions(value: Value) -> Dimensions:
        known = table.get(value.index)
        if known is None:
            known = table[value.index] = tuple(factors.atom(size) for size in value.shape)
        return known

    for value in trace.values:
        if value.source.kind != "result":
            dimensions(value)
    constants = Constants(trace)
    for operation in trace.operations:
        context = RuleContext(operation, factors, dimensions, marks, table)
        found = registry.find(operation.function)
        if found is None:
            unknown.setdefault(operation.name, []).append(operation)
            context.block_all("no rule for this operator")
            continue
        if constants.is_new(operation):
            make_anew(context)
        else:
            found(context)
        constants.follow(operation, operation.index in marks.iota)
        for output in operation.outputs:
            dimensions(output)
    return Axes(trace, registry, factors, table, marks, unknown)
