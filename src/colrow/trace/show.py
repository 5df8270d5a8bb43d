"""A trace as text: module calls, their operators, the calls these implement."""

from __future__ import annotations

from pathlib import Path

from colrow.trace.integers import TracedInt
from colrow.trace.records import FunctionCall, ModuleCall, Operation, Trace, Value
from colrow.trace.tree import map_leaves


def render(trace: Trace, *, copies: bool = False) -> str:
    """A trace as lines of text.

    Args:
        copies: spell out repeated layers too.
    """
    head = (
        f"Trace ({trace.mode}): {len(trace.operations)} operators in {len(trace.modules)} module calls, "
        f"{len(trace.calls)} function calls, {len(trace.values)} values"
    )
    lines = [head]
    _render_call(trace, trace.modules[0], 0, lines, copies) if trace.modules else None
    outputs = ", ".join(
        f"{'.'.join(map(str, path)) or 'result'} = {value!r}" for path, value in trace.outputs
    )
    lines.append(f"returns {outputs or 'no tensors'}")
    lines += [f"escape: {escape}" for escape in trace.escapes]
    lines += [f"warning: {warning}" for warning in trace.warnings]
    return "\n".join(lines)


def _children(trace: Trace) -> dict[int, list[ModuleCall]]:
    found: dict[int, list[ModuleCall]] = {}
    for module in trace.modules:
        if module.parent is not None:
            found.setdefault(module.parent.index, []).append(module)
    return found


def _render_call(trace: Trace, root: ModuleCall, depth: int, lines: list[str], copies: bool) -> None:
    children = _children(trace)

    def module(call: ModuleCall, depth: int) -> None:
        title = f"{'  ' * depth}{call.path or '(model)'}: {call.type_name}"
        if call.copy_of is not None and not copies:
            lines.append(f"{title}, as {call.copy_of.path}, {call.last - call.first} operators")
            return
        lines.append(title)
        inner = children.get(call.index, [])
        position = call.first
        for child in inner:
            operators(trace.operations[position : child.first], depth + 1)
            module(child, depth + 1)
            position = child.last
        operators(trace.operations[position : call.last], depth + 1)

    def operators(operations: list[Operation], depth: int) -> None:
        last: FunctionCall | None = None
        for operation in operations:
            if operation.call is not None and operation.call is not last:
                lines.append(f"{'  ' * depth}{_call_text(operation.call)}")
            last = operation.call
            indent = depth + 1 if operation.call is not None else depth
            lines.append(f"{'  ' * indent}{_operation_text(operation)}")

    module(root, depth)


def _call_text(call: FunctionCall) -> str:
    place = f"{Path(call.origin.file).name}:{call.origin.line}"
    return f"{call.name}({_arguments_text(call.arguments, call.keywords)})  [{place}]"


def _operation_text(operation: Operation) -> str:
    outputs = ", ".join(_value_text(value) for value in operation.outputs)
    arguments = _arguments_text(operation.arguments, operation.keywords)
    return f"{outputs + ' = ' if outputs else ''}{operation.name}({arguments})"


def _value_text(value: Value) -> str:
    return f"{value!r}{' ' + value.source.name if value.source.name else ''}"


def _arguments_text(arguments: tuple[object, ...], keywords: dict[str, object]) -> str:
    texts = [_text(each) for each in arguments]
    texts += [f"{name}={_text(each)}" for name, each in keywords.items()]
    return ", ".join(texts)


class _Text:
    """Stands for itself without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _text(item: object) -> str:
    def leaf(each: object) -> object:
        if isinstance(each, Value):
            return _Text(_value_text(each))
        if isinstance(each, TracedInt):
            return _Text(f"{int.__repr__(each)}:{each.expression}")
        return each

    text = repr(map_leaves(item, leaf))
    return text if len(text) < 200 else text[:197] + "..."
