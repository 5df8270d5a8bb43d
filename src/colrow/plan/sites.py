"""From values and operations of a trace to the places of a plan.

A plan's place stands for all calls of a module, and for all passes of a call in its code; a trace has each of
them. What holds in some of them only cannot be written down, and is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from colrow.plan.exits import paths_of
from colrow.plan.places import Call, CallArgument, CallResult, ModuleInput, ModuleOutput, Place
from colrow.plan.selection import Selection
from colrow.sources import source_of
from colrow.trace.records import FunctionCall, ModuleCall, Operation, Value
from colrow.trace.tree import Path


@dataclass(frozen=True, eq=False)
class Where:
    """One passing of a place: an argument or result of one call of a module, or of a function within it."""

    module: ModuleCall
    path: Path
    is_result: bool
    call: FunctionCall | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """The same for all passings of one place."""
        site = None if self.call is None else _key(self.call)
        return (self.module.path, site, self.path, self.is_result)


class Sites:
    """Finds places by module calls, function calls and values."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._calls: dict[tuple[str, int, int], list[FunctionCall]] = defaultdict(list)
        self._inputs: dict[int, list[tuple[ModuleCall, Path]]] = defaultdict(list)
        self._outputs: dict[int, list[tuple[ModuleCall, Path]]] = defaultdict(list)
        self._modules: dict[str, list[ModuleCall]] = defaultdict(list)
        self._sources: dict[str, str] = {}
        for call in selection.trace.calls:
            self._calls[_key(call)].append(call)
        for module in selection.trace.modules:
            self._modules[module.path].append(module)
            for path, value in module.inputs:
                self._inputs[value.index].append((module, path))
            for path, value in module.outputs:
                self._outputs[value.index].append((module, path))

    def calls_of_module(self, path: str) -> list[ModuleCall]:
        """All calls of a module."""
        return self._modules[path]

    def inputs(self, value: Value) -> list[tuple[ModuleCall, Path]]:
        """Module calls that get the value as an argument, and where."""
        return self._inputs.get(value.index, [])

    def outputs(self, value: Value) -> list[tuple[ModuleCall, Path]]:
        """Module calls that give the value, and where."""
        return self._outputs.get(value.index, [])

    def alike(self, call: FunctionCall) -> list[FunctionCall]:
        """All passes of the same place in the same module's code."""
        return self._calls[_key(call)]

    # ---------------------------------------------------------------- edges

    def readers(
        self,
        value: Value,
        operations: Iterable[Operation],
        everywhere: bool,
        impossible: Collection[tuple[object, ...]] = (),
    ) -> list[Where]:
        """Places where ``value`` can be changed for ``operations`` only.

        One module's output or input where that is enough, else arguments of calls.

        Args:
            everywhere: whether these are all operations that read the value.
            impossible: keys of places where nothing can be done: then it is done farther out, or at calls.

        Raises:
            CannotPlaceError: if an operation reads it where it cannot be got hold of.
        """
        left = {operation.index: operation for operation in operations}
        places: list[Where] = []
        mine = set(left)
        for module, _ in sorted(self.inputs(value), key=lambda one: one[0].first - one[0].last):
            inside = {use.index for use in value.uses if module.first <= use.index < module.last}
            if any(one is value for _, one in module.outputs):
                continue  # what is put in its place would come out again, where it is not meant to be
            if inside & set(left) and inside <= mine:
                found = [Where(module, path, False) for call, path in self.inputs(value) if call is module]
                if any(one.key in impossible for one in found):
                    continue
                places += found
                left = {index: one for index, one in left.items() if index not in inside}
        if everywhere and (left or len(places) > 1):
            made = [
                (module, path)
                for module, path in self.outputs(value)
                if self._made_in(value, module)
                # what is read before it is returned has got away already
                and not any(module.first <= index < module.last for index in mine)
            ]
            made.sort(key=lambda one: -one[0].first)  # the innermost module first
            options = [Where(*one, is_result=True) for one in made]
            producer = value.producer
            if producer is not None and producer.call is not None and left and value not in producer.inputs:
                paths = [path for path, one in paths_of(producer.call.outputs) if one is value]
                options += [Where(producer.call.module, path, True, producer.call) for path in paths[:1]]
            options = [one for one in options if one.key not in impossible]
            if options:
                return options[:1]
        for operation in left.values():
            call = operation.call
            given = [] if call is None else paths_of((call.arguments, call.keywords))
            paths = [path[1:] for path, one in given if one is value]
            if not paths or call is None:
                raise self._selection.cannot("a value cannot be got hold of where it is read", operation)
            places += [Where(call.module, path, False, call) for path in paths]
        return places

    @staticmethod
    def _made_in(value: Value, module: ModuleCall) -> bool:
        return value.producer is not None and module.first <= value.producer.index < module.last

    # ---------------------------------------------------------------- naming

    def places(self, acting: Sequence[Where]) -> list[Place]:
        """The plan's places of what happens at ``acting``, all of which are one place in the program.

        Usually one; several if it happens in certain passes of a call only.

        Raises:
            CannotPlaceError: if it would have to happen in some calls only.
        """
        first = acting[0]
        if first.call is None:
            missing = set(map(id, self.like(first))) - {id(one.module) for one in acting}
            if missing:
                raise self._selection.cannot(
                    f"calls of {first.module.path or 'the model'} differ in what would have to be done",
                    *self._selection.trace.operations[first.module.first : first.module.last],
                )
            return [self._place(first)]
        passes = {one.call.index for one in acting if one.call is not None}
        alike = self.alike(first.call)
        if all(call.index in passes or not self._concerns(call, first) for call in alike):
            return [self._place(first)]
        occurrences = {call.occurrence for call in alike if call.index in passes}
        guessed = first.module.path in self._selection.trace.guessed
        if guessed or any((call.occurrence in occurrences) != (call.index in passes) for call in alike):
            raise self._selection.cannot(
                "passes of a call differ in what would have to be done",
                *self._selection.trace.operations[first.call.first : first.call.last],
            )
        return [self._place(first, occurrence) for occurrence in sorted(occurrences)]

    def passes(self, acting: Sequence[Where]) -> list[CallArgument]:
        """The places of an argument of one call in the program's text, in the passes ``acting`` of it."""
        first = acting[0]
        assert first.call is not None
        passes = {one.call.index for one in acting if one.call is not None}
        alike = self.alike(first.call)
        occurrences = {call.occurrence for call in alike if call.index in passes}
        if all(call.index in passes for call in alike):
            occurrences = {-1}
        elif first.module.path in self._selection.trace.guessed or any(
            (call.occurrence in occurrences) != (call.index in passes) for call in alike
        ):
            raise self._selection.cannot(
                "passes of a call differ in the numbers they would need",
                *self._selection.trace.operations[first.call.first : first.call.last],
            )
        return [
            CallArgument(first.module.path, self.name(first.call, occurrence), first.path)
            for occurrence in sorted(occurrences)
        ]

    def like(self, where: Where) -> list[ModuleCall]:
        """All calls of a module in which a gradient, or a value, passes the same place."""
        found = []
        for module in self._modules[where.module.path]:
            values = dict(module.outputs if where.is_result else module.inputs)
            value = values.get(where.path)
            if value is not None and (value.differentiable or where.is_result):
                found.append(module)
        return found

    @staticmethod
    def _concerns(call: FunctionCall, where: Where) -> bool:
        item = call.outputs if where.is_result else (call.arguments, call.keywords)
        skipped = 0 if where.is_result else 1
        return any(path[skipped:] == where.path and value.differentiable for path, value in paths_of(item))

    def _place(self, where: Where, occurrence: int = -1) -> Place:
        if where.call is None:
            kind = ModuleOutput if where.is_result else ModuleInput
            return kind(where.module.path, where.path)
        call = self.name(where.call, occurrence)
        if where.is_result:
            return CallResult(where.module.path, call, where.path)
        return CallArgument(where.module.path, call, where.path)

    def name(self, call: FunctionCall, occurrence: int = -1) -> Call:
        """A call as a place in the program's text."""
        code = call.site.code
        name = getattr(code, "co_qualname", code.co_name)
        return Call(
            call.name, self._source(call.site.file), name, call.site.line, call.site.instruction, occurrence
        )

    def _source(self, file: str) -> str:
        if file not in self._sources:
            self._sources[file] = source_of(file)
        return self._sources[file]


def _key(call: FunctionCall) -> tuple[str, int, int]:
    return (call.module.path, id(call.site.code), call.site.instruction)


def merged(sets: list[set[tuple[object, ...]]]) -> list[set[tuple[object, ...]]]:
    """Sets that have a member in common become one."""
    found: list[set[tuple[object, ...]]] = []
    owner: dict[tuple[object, ...], set[tuple[object, ...]]] = {}
    for one in sets:
        joined = set(one)
        for other in {id(owner[key]): owner[key] for key in one if key in owner}.values():
            joined |= other
            found.remove(other)
        for key in joined:
            owner[key] = joined
        found.append(joined)
    return found
