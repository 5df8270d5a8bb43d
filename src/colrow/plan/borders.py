"""Where parts become whole again: logits that are gathered or go into a loss, and outputs of the model.

Logits are gathered where their layer gives them, not at the end of the model's forward: what its code does
with them afterwards, on paths that no example showed too, is then done with whole logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from colrow.axes.factor import Reason
from colrow.plan.places import ModuleOutput
from colrow.plan.plan import Gather, Loss
from colrow.plan.selection import Selection
from colrow.trace.records import ModuleCall, Operation, Value


@dataclass
class Borders:
    """Where and how parts become whole.

    Attributes:
        values: indices of the values that do.
        gathers: as actions, at outputs of modules.
        gathered: the values that are gathered, with the module call whose output they are.
        loss: the parallel loss, whose logits layer gathers too where no loss is computed.
        losses: logits that go into a loss, with the call of the layer that gives them.
        unread: logits of the same layer that no loss reads: it gathers them itself.
        notes: why logits are gathered although there is a loss of parts.
    """

    values: set[int] = field(default_factory=set)
    gathers: list[Gather] = field(default_factory=list)
    gathered: list[tuple[Value, ModuleCall]] = field(default_factory=list)
    loss: Loss | None = None
    losses: list[tuple[Value, ModuleCall]] = field(default_factory=list)
    unread: list[tuple[Value, ModuleCall]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_borders(selection: Selection, whole: Mapping[str, Reason] | None = None) -> Borders:
    """The borders of a selection.

    Args:
        selection: what is cut.
        whole: paths of layers whose logits have to be gathered before their loss, and why.

    Raises:
        CannotPlaceError: if cut values reach a loss or an output where they cannot be made whole.
    """
    return _Search(selection, whole or {}).run()


class _Search:
    def __init__(self, selection: Selection, whole: Mapping[str, Reason]) -> None:
        self._selection, self._whole = selection, whole
        self._found = Borders()
        self._output_of: dict[int, list[ModuleCall]] = {}
        for module in selection.trace.modules:
            for _, value in module.outputs:
                if selection.is_cut(value):
                    self._output_of.setdefault(value.index, []).append(module)

    def run(self) -> Borders:
        selection = self._selection
        for operation in selection.trace.operations:
            if selection.classifies(operation):
                for value in operation.inputs:
                    if selection.is_cut(value):
                        self._loss_over(value, operation)
        for _, root in selection.trace.runs:
            for _, value in root.outputs:
                if selection.is_cut(value):
                    self._output(value, root)
        for name, module in {(gathered[1].path): gathered[1] for gathered in self._found.gathered}.items():
            self._check_calls(name, module)
        return self._found

    def _layer(self, value: Value) -> tuple[Value, ModuleCall] | None:
        """The module, other than the model, whose output a value is a reshaped or rescaled copy of."""
        current: Value | None = value
        roots = {id(root) for _, root in self._selection.trace.runs}
        while current is not None:
            modules = [call for call in self._output_of.get(current.index, ()) if id(call) not in roots]
            if modules:
                # the innermost: what surrounds it sees whole logits as well
                return current, max(modules, key=lambda call: call.first)
            producer = current.producer
            if producer is None or self._selection.contracts(producer):
                return None
            inputs = [one for one in producer.inputs if self._selection.is_cut(one)]
            current = inputs[0] if len(inputs) == 1 else None
        return None

    def _loss_over(self, value: Value, operation: Operation) -> None:
        if self._beyond(value):
            return
        layer = self._layer(value)
        labels = self._labels(operation)
        chosen = self._selection.chosen_of(value)
        assert chosen is not None
        if layer is None:
            raise self._selection.cannot("its logits are no output of a layer", operation)
        if not self._can_be_local(layer[0]):
            raise self._selection.cannot(f"some ids of {layer[1].path} are dealt with apart", operation)
        logits, module = layer
        reason = self._whole.get(module.path)
        if labels is None:
            reason = Reason("what it compares with is no argument of the model", operation)
        if reason is not None:
            self._gather(logits, module, always=True)
            note = f"{module.path} is cut, but its logits are gathered before the loss: {reason}"
            if note not in self._found.notes:
                self._found.notes.append(note)
            return
        assert labels is not None
        loss = Loss("", module.path, chosen.name, labels)
        if self._found.loss is not None and self._found.loss != loss:
            raise self._selection.cannot("the model computes more than one loss over cut classes", operation)
        self._found.loss = loss
        self._found.losses.append(layer)
        self._found.values.add(logits.index)

    def _labels(self, operation: Operation) -> str | None:
        """The argument of the model that a loss compares with."""
        if "nll_loss" in operation.name:
            target = operation.arguments[1] if len(operation.arguments) > 1 else None
            return _argument(target) if isinstance(target, Value) else None
        classes = [one for one in operation.outputs if self._selection.is_cut(one)]
        found = (self._labels(use) for one in classes for use in one.uses)
        return next((name for name in found if name is not None), None)

    def _can_be_local(self, logits: Value) -> bool:
        """Whether the classes are the last dimension, cut in one piece."""
        sharding = self._selection.sharding(logits)
        is_last = sharding.dimension == len(logits.shape) - 1
        return is_last and len(sharding.layout.segments) == 1 and sharding.layout.segments[0].outer == 1

    def _output(self, value: Value, root: ModuleCall) -> None:
        if self._beyond(value):
            return
        layer = self._layer(value)
        if layer is not None and self._ends_in_outputs(layer[0]):
            self._gather(*layer)
        else:
            self._gather(value, root)

    def _beyond(self, value: Value) -> bool:
        """Whether the value follows from values that are whole again, on every path."""
        seen: set[int] = set()
        stack = [value]
        while stack:
            current = stack.pop()
            if current.index in self._found.values or current.index in seen:
                continue
            seen.add(current.index)
            if current.producer is None:
                return False
            inputs = [one for one in current.producer.inputs if self._selection.is_cut(one)]
            if not inputs or any(one.source.kind == "parameter" for one in inputs):
                return False
            stack += inputs
        return True

    def _ends_in_outputs(self, value: Value) -> bool:
        """Whether nothing that is computed from the value sums over the axis or meets other parts."""
        stack, seen = [value], set[int]()
        while stack:
            current = stack.pop()
            for use in current.uses:
                if use.index in seen:
                    continue
                seen.add(use.index)
                if self._selection.contracts(use):
                    return False
                if any(one.source.kind == "parameter" and self._selection.is_cut(one) for one in use.inputs):
                    return False
                stack += [one for one in use.outputs if self._selection.is_cut(one)]
        return True

    def _gather(self, value: Value, module: ModuleCall, always: bool = False) -> None:
        if value.index in self._found.values:
            return
        if module.parent is not None:
            # an output of the model itself becomes whole when all has been computed
            self._found.values.add(value.index)
        loss = self._found.loss
        if loss is not None and loss.logits == module.path:
            self._found.unread.append((value, module))
            return
        self._found.gathered.append((value, module))
        path = next(path for path, one in module.outputs if one is value)
        gather = Gather(ModuleOutput(module.path, path), self._selection.sharding(value), always)
        known = [one for one in self._found.gathers if one.place == gather.place]
        if known and not _alike(known[0], gather):
            raise self._selection.cannot("the model's output is cut in different ways", value)
        if not known:
            self._found.gathers.append(gather)

    def _check_calls(self, path: str, module: ModuleCall) -> None:
        """Every call of a module whose output is gathered must be one whose output is cut."""
        for call in self._selection.trace.modules:
            if call.path == path and not any(self._selection.is_cut(one) for _, one in call.outputs):
                raise self._selection.cannot(
                    f"{path} gives parts in some calls only", *[one for _, one in module.outputs]
                )


def _alike(one: Gather, other: Gather) -> bool:
    """Whether two gathers differ in nothing but the sizes of a batch."""
    first, second = one.sharding, other.sharding
    return first.axis == second.axis and first.dimension == second.dimension


def _argument(value: Value) -> str | None:
    """The name of the model's argument that a value is made from, alone."""
    current: Value | None = value
    while current is not None:
        if current.source.kind == "input":
            return current.source.name.split(".")[0]
        inputs = current.producer.inputs if current.producer is not None else ()
        current = inputs[0] if inputs else None
    return None
