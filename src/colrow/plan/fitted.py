"""Which axes the numbers of a plan were worked out for: their cuts cannot be edited alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from colrow.localise.arguments import integers_of
from colrow.plan.plan import Axis, LocalAttribute, LocalInteger, Plan
from colrow.plan.selection import Selection
from colrow.trace.integers import Attribute, TracedInt, origins
from colrow.trace.records import Operation


def fitted(plan: Plan, selection: Selection) -> Plan:
    """The plan, in which each axis that a number may depend on says for which cut that was worked out.

    That is every axis which is met by the calls that get the number. Where these cannot be told, because an
    object in a module holds it, every axis in that module, or every axis if that is not called.
    """
    names = set(_axes_of_integers(plan.integers, selection)) | set(
        _axes_of_attributes(plan.attributes, selection)
    )
    axes = {
        name: Axis(name, axis.cut, axis.cut.counts if name in names else ())
        for name, axis in plan.axes.items()
    }
    return replace(plan, axes=axes)


def _axes_of_integers(integers: Sequence[LocalInteger], selection: Selection) -> Iterable[str]:
    if not integers:
        return
    operations: dict[tuple[str, str, str, int], list[Operation]] = defaultdict(list)
    for call in selection.trace.calls:
        code = call.site.code
        where = (call.module.path, call.name, code.co_qualname, call.site.instruction)
        operations[where] += selection.trace.operations[call.first : call.last]
    for integer in integers:
        place, call_ = integer.place, integer.place.call
        yield from _met(operations[place.module, call_.function, call_.code, call_.instruction], selection)


def _axes_of_attributes(attributes: Sequence[LocalAttribute], selection: Selection) -> Iterable[str]:
    trace = selection.trace
    left = {(attribute.module, attribute.attribute) for attribute in attributes}
    if not left:
        return
    wanted = frozenset(left)
    for call in trace.calls:
        numbers = integers_of(call).values()
        expressions = [number.expression for number in numbers if isinstance(number, TracedInt)]
        found = {
            (one.module, one.path)
            for each in expressions
            for one in origins(each)
            if isinstance(one, Attribute)
        }
        if found & wanted:
            left -= found
            yield from _met(trace.operations[call.first : call.last], selection)
    for path, _ in left:
        calls = [one for one in trace.modules if one.path == path]
        for module in calls:
            yield from _met(trace.operations[module.first : module.last], selection)
        if not calls:
            yield from (one.name for one in selection.chosen)


def _met(operations: Iterable[Operation], selection: Selection) -> Iterable[str]:
    for operation in operations:
        for value in (*operation.inputs, *operation.outputs):
            chosen = selection.chosen_of(value)
            if chosen is not None:
                yield chosen.name
