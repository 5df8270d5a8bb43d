"""Repeated layers: the record of a layer is copied for siblings that would do the same.

Siblings are the members of a ``ModuleList`` or ``Sequential``. Known limit: integers that equal a layer's
position in its list are taken for its number, so that behaviour which depends on nothing else is not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from colrow.trace.alike import ModuleComparison, plain_arguments
from colrow.trace.copying import Copied, Copy, Position, Template
from colrow.trace.integers import TracedInt
from colrow.trace.recorder import Recorder
from colrow.trace.records import ModuleCall, Value
from colrow.trace.tree import tensors_of

State: TypeAlias = list[tuple[int, ...]]


def state_of(module: nn.Module) -> State:
    """What a module and its parts hold: the ``id`` of attributes and of items in lists and dictionaries."""
    found: State = []
    for each in module.modules():
        found.append(tuple(map(id, vars(each).values())))
        for item in vars(each).values():
            if isinstance(item, list | set):
                found.append(tuple(map(id, item)))
            elif isinstance(item, dict):
                found.append(tuple(map(id, item.values())))
    return found


@dataclass(frozen=True)
class Before:
    """What there was before a layer ran.

    Attributes:
        position: of the trace.
        contents: what was known of the tensors among its arguments.
        state: what it held.
    """

    position: Position
    contents: list[Tensor | None]
    state: State


class Repeater:
    """Remembers layers that ran and copies their records.

    Args:
        enabled: without it no layer is ever copied.
    """

    def __init__(self, recorder: Recorder, model: nn.Module, enabled: bool) -> None:
        self._recorder = recorder
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._templates: dict[int, list[Template]] = {}
        self._places: dict[int, tuple[int, int]] = {}
        for container in model.modules() if enabled else ():
            if isinstance(container, nn.ModuleList | nn.Sequential) and len(container) > 1:
                for place, child in enumerate(container):
                    self._places.setdefault(id(child), (id(container), place))

    def path(self, module: nn.Module) -> str | None:
        """The module's name in the model; None if it is no part of it."""
        return self._paths.get(id(module))

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> Before | None:
        """What :meth:`remember` needs to know of the time before a layer runs; None if it has no siblings."""
        if id(module) not in self._places or not plain_arguments(arguments):
            return None
        with self._recorder.pause():
            return Before(self._position(), self._contents(arguments), state_of(module))

    def remember(
        self,
        module: nn.Module,
        record: ModuleCall,
        arguments: tuple[Any, ...],
        result: Any,
        before: Before,
    ) -> None:
        """Keep a layer's record, if it can be copied."""
        if before.state != state_of(module) or not plain_arguments(result):
            # others may read what it keeps, so its siblings have to keep theirs
            return
        first, last = before.position, self._position()
        value_of = self._recorder.value_of
        own = {value_of(tensor).index for tensor in tensors_of(arguments)}
        own |= {value_of(tensor).index for tensor in _own_tensors(module).values()}
        for operation in self._recorder.trace.operations[first.operations : last.operations]:
            if any(value.index < first.values and value.index not in own for value in operation.inputs):
                # it reads something of its surroundings: its siblings might read something else
                return
            if any(value.index < first.values and value.content is not None for value in operation.outputs):
                # it changes known content: its siblings have to change it again
                return
        container, place = self._places[id(module)]
        gradient = torch.is_grad_enabled()
        self._templates.setdefault(container, []).append(
            Template(module, place, record, arguments, result, before.contents, gradient, first, last)
        )

    def _position(self) -> Position:
        trace = self._recorder.trace
        return Position(
            len(trace.values),
            len(trace.operations),
            len(trace.calls),
            len(trace.modules),
            len(trace.escapes),
            len(trace.written),
            len(trace.recomputed),
            len(self._recorder.kept_after),
            self._recorder.checkpoints,
        )

    def _contents(self, arguments: tuple[Any, ...]) -> list[Tensor | None]:
        return [self._recorder.value_of(tensor).content for tensor in tensors_of(arguments)]

    def copy(self, module: nn.Module, arguments: tuple[Any, ...]) -> Copied | None:
        """Record a call of a layer as a copy of a sibling's; None if it must run."""
        if id(module) not in self._places or not plain_arguments(arguments):
            return None
        container, place = self._places[id(module)]
        with self._recorder.pause():
            for template in self._templates.get(container, []):
                comparison = ModuleComparison(template.place, place)
                if self._same_call(template, arguments) and comparison.alike(template.module, module):
                    values = self._pair_values(template, module, arguments)
                    if values is not None:
                        return Copy(self._recorder, template, module, self._paths, values).run()
        return None

    def _same_call(self, template: Template, arguments: tuple[Any, ...]) -> bool:
        if template.gradient_enabled != torch.is_grad_enabled():
            return False
        if not _same_arguments(template.arguments, arguments):
            return False
        contents = self._contents(arguments)
        return all(map(_same_content, template.contents, contents))

    def _pair_values(
        self, template: Template, module: nn.Module, arguments: tuple[Any, ...]
    ) -> dict[int, Value] | None:
        """The new layer's values by the index of the old one's; None if ties differ."""
        value_of = self._recorder.value_of
        parts = [[path for path, _ in each.named_modules()] for each in (template.module, module)]
        if parts[0] != parts[1]:
            return None
        if any(id(part) not in self._paths for each in (template.module, module) for part in each.modules()):
            return None  # a forward has put new modules in
        old_tensors, new_tensors = _own_tensors(template.module), _own_tensors(module)
        if list(old_tensors) != list(new_tensors):
            return None
        pairs = [*zip(old_tensors.values(), new_tensors.values(), strict=True)]
        pairs += zip(tensors_of(template.arguments), tensors_of(arguments), strict=True)
        values: dict[int, Value] = {}
        for old, new in pairs:
            if values.setdefault(value_of(old).index, value_of(new)) is not value_of(new):
                return None
        return values


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensor attributes of a module by their names within it."""
    found: dict[str, Tensor] = {}
    found.update(module.named_parameters(remove_duplicate=False))
    found.update(module.named_buffers(remove_duplicate=False))
    for path, each in module.named_modules(remove_duplicate=False):
        for name, item in vars(each).items():
            if isinstance(item, Tensor):
                found[f"{path}.{name}" if path else name] = item
    return found


def _same_arguments(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.shape, one.stride(), one.dtype, one.requires_grad) == (
            other.shape,
            other.stride(),
            other.dtype,
            other.requires_grad,
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same_arguments, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same_arguments(one[key], other[key]) for key in one)
    if isinstance(one, TracedInt):
        return bool(one.expression == other.expression)
    return bool(one == other)


def _same_content(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one, other)
