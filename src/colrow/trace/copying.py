"""Copying the record of a layer for another one with the same structure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from colrow.trace.integers import Attribute, Expression, Size, TracedInt, substitute
from colrow.trace.recorder import Recorder
from colrow.trace.records import (
    Escape,
    FunctionCall,
    ModuleCall,
    Operation,
    Recomputation,
    Value,
    WrittenGradient,
)
from colrow.trace.tree import map_leaves


@dataclass(frozen=True)
class Position:
    """How long the lists of a trace were at some point of the run, and in how many checkpoints it was."""

    values: int
    operations: int
    calls: int
    modules: int
    escapes: int
    written: int
    recomputed: int
    kept: int
    checkpoints: int


@dataclass(frozen=True)
class Template:
    """The record of a layer that ran.

    Attributes:
        module: the layer.
        place: its position among its siblings.
        record: its call.
        arguments: its positional and keyword arguments.
        result: what it returned.
        contents: what was known of the tensors among the arguments before it ran.
        gradient_enabled: whether autograd recorded.
        first, last: the positions before and after.
    """

    module: nn.Module
    place: int
    record: ModuleCall
    arguments: tuple[Any, ...]
    result: Any
    contents: list[Tensor | None]
    gradient_enabled: bool
    first: Position
    last: Position


@dataclass(frozen=True)
class Copied:
    """What a layer returns that was copied."""

    result: Any


class Copy:
    """One copy of a template's record.

    Args:
        module: the layer that does not run.
        paths: names of modules by their ``id``.
        values: its parameters, buffers and arguments by the index of the template's.
    """

    def __init__(
        self,
        recorder: Recorder,
        template: Template,
        module: nn.Module,
        paths: dict[int, str],
        values: dict[int, Value],
    ) -> None:
        self.recorder = recorder
        self.template = template
        old_parts = template.module.modules()
        new_parts = module.modules()
        self.parts = {
            paths[id(old)]: (paths[id(new)], old, new) for old, new in zip(old_parts, new_parts, strict=True)
        }
        self.values = values
        self.shift = len(recorder.trace.operations) - template.first.operations
        self.modules: dict[int, ModuleCall] = {}
        self.calls: dict[int, FunctionCall] = {}

    def run(self) -> Copied:
        trace = self.recorder.trace
        first, last = self.template.first, self.template.last
        self._copy_values(trace.values[first.values : last.values])
        # the layer's own record stands one before the first position
        for module in trace.modules[first.modules - 1 : last.modules]:
            self._copy_module(module)
        for call in trace.calls[first.calls : last.calls]:
            self._copy_call(call)
        for operation in trace.operations[first.operations : last.operations]:
            self._copy_operation(operation)
        for escape in trace.escapes[first.escapes : last.escapes]:
            inside = self.modules[escape.module.index] if escape.module is not None else None
            trace.escapes.append(Escape(self._moved(escape.expression), escape.use, inside, escape.site))
        for written in trace.written[first.written : last.written]:
            self._copy_written(written)
        for recomputed in trace.recomputed[first.recomputed : last.recomputed]:
            self._copy_recomputed(recomputed)
        trace.read |= {new.index for old, new in self.values.items() if old in trace.read}
        kept = self.recorder.kept_after
        deeper = self.recorder.checkpoints - first.checkpoints
        kept += [(after + self.shift, depth + deeper) for after, depth in kept[first.kept : last.kept]]
        return Copied(map_leaves(self.template.result, self._result))

    def _copy_values(self, originals: list[Value]) -> None:
        table = self.recorder.table
        storages = {self.recorder.trace.values[old].storage: new.storage for old, new in self.values.items()}
        for old in originals:
            if old.storage not in storages:
                storages[old.storage] = table.new_storage()
            new = table.add_detached(old.shape, old.dtype, old.source, storages[old.storage], old.content)
            self.values[old.index] = new
            self.recorder.gradients.copy(old, new)
            self.recorder.origins.copy(old, new)
            if old.read is not None:
                new.read = (old.read[0] + self.shift, old.read[1])

    def _copy_module(self, old: ModuleCall) -> None:
        trace = self.recorder.trace
        parent: ModuleCall | None
        parent = self.recorder.module
        if old is not self.template.record and old.parent is not None:
            parent = self.modules[old.parent.index]
        new = ModuleCall(
            len(trace.modules),
            self._moved_path(old.path),
            parent,
            old.first + self.shift,
            old.last + self.shift,
            [(path, self._value(value)) for path, value in old.inputs],
            [(path, self._value(value)) for path, value in old.outputs],
            old.type_name,
            old.copy_of or old,
        )
        trace.modules.append(new)
        self.modules[old.index] = new

    def _copy_call(self, old: FunctionCall) -> None:
        trace = self.recorder.trace
        new = FunctionCall(
            len(trace.calls),
            old.function,
            map_leaves(old.arguments, self._leaf),
            map_leaves(old.keywords, self._leaf),
            self.modules[old.module.index],
            old.site,
            old.origin,
            old.first + self.shift,
            old.occurrence,
            old.last + self.shift,
            map_leaves(old.outputs, self._leaf),
        )
        trace.calls.append(new)
        self.calls[old.index] = new

    def _copy_operation(self, old: Operation) -> None:
        trace = self.recorder.trace
        new = Operation(
            len(trace.operations),
            old.function,
            map_leaves(old.arguments, self._leaf),
            map_leaves(old.keywords, self._leaf),
            tuple([self._value(value) for value in old.inputs]),
            tuple([self._value(value) for value in old.outputs]),
            self.modules[old.module.index] if old.module is not None else None,
            self.calls[old.call.index] if old.call is not None else None,
        )
        trace.operations.append(new)
        for before, value in zip(old.outputs, new.outputs, strict=True):
            if before.producer is old:
                value.producer = new
        for value in new.inputs:
            value.uses.append(new)

    def _copy_written(self, old: WrittenGradient) -> None:
        new = replace(
            old,
            inputs=tuple(map(self._value, old.inputs)),
            outputs=tuple(map(self._value, old.outputs)),
            module=self.modules[old.module.index] if old.module is not None else None,
            first=old.first + self.shift,
            last=old.last + self.shift,
            copied=True,
        )
        self.recorder.trace.written.append(new)

    def _copy_recomputed(self, old: Recomputation) -> None:
        inside = self.modules[old.module.index] if old.module is not None else None
        new = replace(
            old,
            module=inside,
            first=old.first + self.shift,
            last=old.last + self.shift,
            repeated=old.repeated + self.shift,
        )
        self.recorder.trace.recomputed.append(new)

    def _value(self, value: Value) -> Value:
        return self.values.get(value.index, value)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return self._value(leaf)
        if isinstance(leaf, TracedInt):
            return TracedInt(leaf, self._moved(leaf.expression), leaf.listener)
        return leaf

    def _result(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return self._leaf(leaf)
        table = self.recorder.table
        value = self._value(self.recorder.value_of(leaf))
        tensor = table.tensor_of(value)
        if tensor is None:
            with torch.set_grad_enabled(leaf.requires_grad):
                tensor = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
                if leaf.requires_grad:
                    # not a leaf of autograd, so that the program may write into it
                    tensor = tensor.requires_grad_().clone()
            table.attach(value, tensor)
        return tensor

    def _moved_path(self, path: str) -> str:
        return self.parts[path][0] if path in self.parts else path

    def _moved_attribute(self, attribute: Attribute) -> Attribute:
        if attribute.module not in self.parts:
            return attribute
        path, old, new = self.parts[attribute.module]
        before: Any = old
        after: Any = new
        for name in attribute.path.split(".")[:-1]:
            before, after = _item(before, name), _item(after, name)
            if before is after:
                # both layers hold the same object, which has one name
                return attribute
        return Attribute(path, attribute.path, attribute.value)

    def _moved(self, expression: Expression) -> Expression:
        def replace(origin: Attribute | Size) -> Expression:
            if isinstance(origin, Attribute):
                return self._moved_attribute(origin)
            index = self._value(self.recorder.trace.values[origin.value_index]).index
            return Size(index, origin.dimension, origin.value)

        return substitute(expression, replace)


def _item(holder: Any, name: str) -> Any:
    """One step of an attribute's path."""
    if isinstance(holder, dict):
        return holder.get(name)
    if isinstance(holder, tuple | list):
        return holder[int(name)]
    return vars(holder).get(name)
