"""What gradients that a program writes itself mean for a plan: what must stay whole, and what must be summed.

A plan takes gradients to be those of the recorded operators: linear in the gradient that comes in, and cut as
the forward is cut. A written gradient may be anything. It is tried, see :mod:`colrow.trace.derivative`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace

from colrow.trace.derivative import examine
from colrow.trace.records import Trace, Value, WrittenGradient
from colrow.trace.trial import Finding

_REMEDY = "make it a torch.library.custom_op with a rule to have it cut (docs/adding-a-rule.md)"


def judge(trace: Trace, unknown: Container[str]) -> list[WrittenGradient]:
    """The written gradients that are not what autograd would make of the operators.

    What they do is found out once for all that are alike, and what that means is among the trace's warnings.

    Args:
        unknown: names of the operators that have no rule. What a rule says of a custom operator holds.
    """
    known: dict[str, Finding] = {}
    for written in trace.written:
        if written.finding is None and written.trial is not None:
            key = written.trial.key
            if key not in known:
                known[key] = examine(written.trial)
            written.finding = _as_recorded(trace, written, known[key])
            if written.kind == "function" and not written.copied:
                _note(trace, written, written.finding)
    return [written for written in trace.written if _matters(trace, written, unknown)]


def is_linear(written: WrittenGradient) -> bool:
    """Whether parts of a sum of gradients may pass through it."""
    return written.finding is not None and written.finding.is_linear


def whole_dimensions(written: WrittenGradient) -> Iterator[tuple[Value, int]]:
    """The dimensions that must not be cut."""
    if written.kind == "operator":
        return  # nothing of an operator without a rule is cut
    free = written.finding.free if written.finding is not None else None
    for value in {value.index: value for value in (*written.inputs, *written.outputs)}.values():
        for dimension in range(len(value.shape)):
            if free is None or dimension not in free:
                yield value, dimension


def reason(written: WrittenGradient) -> str:
    """Why these dimensions must not be cut."""
    if written.kind in ("hook", "parameter hook"):
        return f"{written.name} is shown its gradient"
    found = written.finding
    if found is not None and found.why:
        return f"the backward of {written.name} is not known: {found.why}"
    return f"the backward of {written.name} is not the derivative of its forward, and needs it as a whole"


def _matters(trace: Trace, written: WrittenGradient, unknown: Container[str]) -> bool:
    if written.finding is not None and written.finding.is_derivative:
        return False
    if written.kind == "operator":
        return not is_linear(written) and trace.operations[written.first].name in unknown
    return True


def _as_recorded(trace: Trace, written: WrittenGradient, found: Finding) -> Finding:
    """What was found out, less what the record does not bear out: gradients for what is never read."""
    operations = trace.operations[written.first : written.last]
    read = {id(value) for operation in operations for value in operation.inputs}
    if all(id(value) in read for value in written.inputs if value.differentiable):
        return found
    return found if found.is_derivative else replace(found, is_linear=False)


def _note(trace: Trace, written: WrittenGradient, found: Finding) -> None:
    if found.is_derivative:
        return
    where = f"{written.site}, in {(written.module and written.module.path) or 'the model itself'}"
    texts = []
    if found.why:
        texts.append(f"is not known, so that what goes in and out stays whole: {found.why}; {_REMEDY}")
    elif not found.is_linear:
        texts.append("is not linear in the gradient, so that gradients are summed before they reach it")
    for text in texts:
        note = f"{where}: the backward of {written.name} {text}"
        if note not in trace.warnings:
            trace.warnings.append(note)
