"""How far a sequence can stay cut: from the partial sums that become parts to whatever needs the whole.

Partial sums leave a region by an all-reduce. Instead each rank can get the sum of its part of the sequence,
and go on with that through whatever treats every token by itself: norms, residuals, dropout, routers. Where
the next region begins, or something needs the whole, the parts are gathered (Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4.2.2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from colrow.plan.exits import Reductions
from colrow.plan.gradients import Summation
from colrow.plan.selection import CannotPlaceError, Selection
from colrow.plan.sequence.cut import Crossing, PartStates, SequenceCut, Way, dimension_of
from colrow.plan.sequence.numbers import Numbers
from colrow.plan.sites import Sites, Where
from colrow.plan.states import States
from colrow.trace.records import FunctionCall, ModuleCall, Operation, Value

ATTEMPTS = 400
"""A search that has not ended by then is given up."""


class _AgainError(Exception):
    """Something cannot be cut, and has been noted: begin again without it."""


class Spread:
    """The search for one sequence.

    Whatever turns out to be impossible is noted in one of the sets below, and everything is done again: parts
    end earlier then, at last nothing is cut.

    Args:
        states, reductions, summations: of the selection whose regions there are.
        selection: of the sequence's axes.
        biases: those that a linear layer adds to what leaves a region, by the value that it gives, with its
            call.
        others: values that are parts of another sequence.
        tables: paths of the embeddings whose rows may become parts.
    """

    def __init__(
        self,
        name: str,
        states: States,
        reductions: Reductions,
        summations: list[Summation],
        selection: Selection,
        biases: dict[int, tuple[Value, ModuleCall]],
        others: set[int],
        tables: set[str],
    ) -> None:
        self._states, self._reductions = states, reductions
        self._trace = states.selection.trace
        self._name, self._selection = name, selection
        self._biases = biases
        self._axes = selection.axes
        self._atoms = {atom.index for one in selection.chosen for atom in one.candidate.atoms}
        self._sites = Sites(selection)
        self._summed = {
            (one.value.index, operation.index) for one in summations for operation in one.operations
        }
        #: values all of whose gradients are summed where they are read
        self._entering = {one.value.index for one in summations if one.everywhere}
        self._outputs = {value.index for _, root in self._trace.runs for _, value in root.outputs}
        self._regions = [self._is_region(operation) for operation in self._trace.operations]
        self._known: dict[int, bool] = {}
        self._sources = self._find_sources(tables)
        self._ranges = self._find_ranges()
        #: calls that get the whole
        self._refused: set[int] = set()
        #: values that must not be parts
        self._whole = others | {value.index for _, value in self._trace.kept}
        #: parts that nobody reads as such
        self._ended: set[int] = set()
        self._known_misused: set[int] = set()
        #: whole values of which the parts are taken where they are first read, and those where that is no use
        self._taken: set[int] = set()
        self._left: set[int] = set()
        #: places at which nothing can be done
        self._impossible: set[tuple[object, ...]] = set()
        for written in self._trace.written:
            found = written.finding
            if found is None or not found.is_derivative:
                self._whole.update(value.index for value in (*written.inputs, *written.outputs))
                self._refuse(self._trace.operations[written.first : written.last])
        self._keep_guessed_whole()

    # ---------------------------------------------------------------- what is known

    def _is_region(self, operation: Operation) -> bool:
        """Whether the operation works on parts or partial sums of another axis."""
        states = self._states
        return (
            any(states.is_local(value) or states.made_local(value) for value in operation.inputs)
            or any(states.made_local(value) for value in operation.outputs)
            or any(self._is_partial(value, operation) for value in (*operation.inputs, *operation.outputs))
        )

    def _is_partial(self, value: Value, operation: Operation) -> bool:
        return self._reductions.is_partial(value, operation)

    def _find_sources(self, tables: set[str]) -> list[list[Value]]:
        """Values that leave regions, those of one place of the plan together."""
        found: dict[tuple[object, ...], list[Value]] = defaultdict(list)
        for one in self._reductions.all:
            found[Where(one.module, one.path, True, one.call).key].append(one.value)
        for operation in self._trace.operations:
            module = operation.module
            if module is None or module.path not in tables or not self._states.is_local(operation.inputs[0]):
                continue
            if self._states.selection.looks_up(operation):
                found["lookup", module.path].append(operation.outputs[0])
        return list(found.values())

    def _find_ranges(self) -> list[tuple[int, int]]:
        """The operations among which parts stay: those of the innermost modules in which all come to be.

        What code around them does with their outputs, on paths that no example showed too, is done with
        wholes: a generation takes the last token of what all layers give.
        """
        around: dict[int, ModuleCall | None] = {}
        begun: dict[int, Operation] = {}
        for values in self._sources:
            for value in values:
                producer = value.producer
                if dimension_of(self._selection, value) is None or producer is None:
                    continue
                root = next(root for _, root in self._trace.runs if root.first <= producer.index < root.last)
                begun.setdefault(root.index, producer)
                module = around.get(root.index, producer.module)
                while module is not None and not module.first <= producer.index < module.last:
                    module = module.parent
                around[root.index] = module
        found = []
        for root_index, module in around.items():
            leaf = begun[root_index].module
            # a module that gives but one such value does nothing with it itself
            if module is not None and module is leaf and module.parent is not None:
                module = module.parent
            if module is not None:
                found.append((module.first, module.last))
        return found

    def _has(self, value: Value) -> bool:
        """Whether the sequence runs through the value."""
        if value.index not in self._known:
            self._known[value.index] = any(atom.index in self._atoms for atom in self._axes.atoms(value))
        return self._known[value.index]

    def _treats_tokens_alike(self, operation: Operation) -> bool:
        """Whether the operator's rule lets it work on parts of the sequence."""
        if self._axes.registry.find(operation.function) is None:
            return False
        marks = self._axes.marks
        return not any(
            atom.index in self._atoms
            for mark in (marks.contracted, marks.looked_up, marks.iota, marks.classes, marks.blocked)
            for atom in self._axes.marked(mark, operation)
        )

    def _keep_guessed_whole(self) -> None:
        """Parts do not pass through the code of a module that was guessed at: it may take another course."""
        guessed = self._trace.guessed
        for module in self._trace.modules:
            if module.parent is not None and module.parent.path in guessed:
                self._whole.update(value.index for _, value in (*module.inputs, *module.outputs))
        self._refuse(
            operation
            for operation in self._trace.operations
            if operation.module is not None and operation.module.path in guessed
        )

    # ---------------------------------------------------------------- searching

    def run(self) -> SequenceCut | None:
        """What can be cut; ``None`` if nothing can."""
        # each attempt takes away something that there is less and less of
        for _ in range(ATTEMPTS):
            try:
                found = self._attempt()
            except _AgainError:
                continue
            return found if found.scattered else None
        return None

    def _attempt(self) -> SequenceCut:
        self._follow()
        self._check_ends()
        found = SequenceCut(self._name, self._selection, set(self._cut))
        found.scattered = {
            value.index: dimension
            for values in self._sources
            for value in values
            if value.index in self._cut and (dimension := found.dimension(value)) is not None
        }
        self._cross(found)
        self._return(found)
        self._check_use(found)
        self._check_draws()
        self._parameters(found)
        self._check_numbers(found)
        return found

    def _refuse(self, operations: Iterable[Operation]) -> None:
        self._refused.update(operation.call.index for operation in operations if operation.call is not None)

    def _keep_whole(self, values: Iterable[Value]) -> None:
        """The values must not be parts: what makes them gets the whole. Taken ones are left."""
        for value in values:
            if value.index in self._taken:
                self._taken.discard(value.index)
                self._left.add(value.index)
            self._whole.add(value.index)
            self._ended.discard(value.index)

    def _follow(self) -> None:
        """Which values are parts, and who reads what how."""
        #: calls that get the whole as things are
        self._uncut = set(self._refused)
        while not self._follow_once():
            pass

    def _follow_once(self) -> bool:
        """False if something was taken for cut that is not: no part of a call can be had alone."""
        self._cut: set[int] = set()
        self._slices: dict[int, list[Operation]] = defaultdict(list)
        self._reads: dict[int, list[Operation]] = defaultdict(list)
        self._parts: set[int] = set()  # operations that work on parts
        calls: set[int] = set()
        sources = {value.index for values in self._sources for value in values}
        for operation in self._trace.operations:
            cut = [
                value
                for value in dict.fromkeys(operation.inputs)
                if value.index in self._cut and not self._is_partial(value, operation)
            ]
            taken = any(value.index in self._taken for value in operation.inputs)
            if (cut or taken) and self._may_be_cut(operation, cut):
                self._parts.add(operation.index)
                assert operation.call is not None
                calls.add(operation.call.index)
                for value in dict.fromkeys(operation.inputs):
                    if value.index not in self._cut and self._has(value):
                        self._slices[value.index].append(operation)
                self._cut.update(value.index for value in operation.outputs if self._has(value))
            elif cut:
                for value in cut:
                    self._reads[value.index].append(operation)
                if operation.call is not None:
                    self._uncut.add(operation.call.index)
            for value in operation.outputs:
                if value.index in sources and value.index not in self._whole:
                    self._cut.add(value.index)
        return not calls & self._uncut

    def _may_be_cut(self, operation: Operation, cut: list[Value]) -> bool:
        call = operation.call
        if not any(first <= operation.index < last for first, last in self._ranges):
            return False
        if call is None or call.index in self._uncut or self._regions[operation.index]:
            return False
        if any((value.index, operation.index) in self._summed for value in operation.inputs):
            return False  # a region begins
        if any(value.index in self._ended for value in cut) or not self._treats_tokens_alike(operation):
            return False
        if any(value.index in self._whole or not self._has(value) for value in operation.outputs):
            return False
        # what is whole is sliced: not if it is written into, nor if there is no telling what a rank's part is
        return not any(
            value in operation.outputs or self._dimension(value) is None
            for value in operation.inputs
            if self._has(value) and value not in cut
        )

    def _dimension(self, value: Value) -> int | None:
        return dimension_of(self._selection, value)

    def _check_ends(self) -> None:
        """What leaves a region at one place becomes parts there always, or never; parts can be gathered."""
        bad: list[Value] = []
        useless: list[Value] = []
        for values in self._sources:
            cut = [value for value in values if value.index in self._cut]
            if cut and (len(cut) < len(values) or any(self._dimension(value) is None for value in cut)):
                bad += values
            elif cut and not any(use.index in self._parts for value in cut for use in value.uses):
                useless += cut
        for index in {*self._reads, *(self._outputs & self._cut)}:
            if self._dimension(self._trace.values[index]) is None:
                bad.append(self._trace.values[index])
        # without those that nobody may read as parts, others may be of use
        bad = bad or [value for value in useless if value.index in self._ended] or useless
        if bad:
            self._keep_whole(bad)
            raise _AgainError

    # ---------------------------------------------------------------- crossings

    def _cross(self, found: SequenceCut) -> None:
        for index, operations in self._reads.items():
            value = self._trace.values[index]
            whole = [
                operation
                for operation in operations
                if index not in self._entering
                and (index, operation.index) not in self._summed
                and any(result.differentiable for result in operation.outputs)
            ]
            passing = [operation for operation in whole if self._only_enters(operation)]
            way: Way = "partial"
            if len(passing) < len(whole) or not value.differentiable:
                way = "whole"
            else:
                found.absorbed.update(one.index for operation in passing for one in operation.outputs)
            others = [use for use in value.uses if use not in operations and not self._is_partial(value, use)]
            everywhere = not others and index not in self._outputs
            self._add(found, value, operations, way, everywhere)
        for index, operations in self._slices.items():
            value = self._trace.values[index]
            everywhere = all(use in operations for use in value.uses) and index not in self._outputs
            self._add(found, value, operations, "slice", everywhere)
        self._check_places(found)

    def _only_enters(self, operation: Operation) -> bool:
        """Whether nothing is done with the result but to enter a region, as with a slice of all tokens."""
        return not self._regions[operation.index] and all(
            value.index in self._entering and value.index not in self._outputs for value in operation.outputs
        )

    def _add(
        self, found: SequenceCut, value: Value, operations: list[Operation], way: Way, everywhere: bool
    ) -> None:
        dimension = found.dimension(value)
        assert dimension is not None
        try:
            places = self._sites.readers(value, operations, everywhere, self._impossible)
        except CannotPlaceError:
            self._give_up(value, operations, way)
        found.crossings.append(Crossing(value, tuple(operations), way, dimension, tuple(places)))

    def _give_up(self, value: Value, operations: Iterable[Operation], way: Way) -> None:
        """This crossing cannot be done.

        Raises:
            _AgainError: always.
        """
        if way == "slice":
            if value.index in self._taken:
                self._taken.discard(value.index)
                self._left.add(value.index)
            else:
                self._refuse(operations)
        else:
            self._keep_whole([value])
        raise _AgainError

    def _check_places(self, found: SequenceCut) -> None:
        """Each place of the plan stands for all calls of its module: the same must happen in all of them."""
        groups: dict[tuple[object, ...], list[tuple[Where, Crossing]]] = defaultdict(list)
        for crossing in found.crossings:
            for where in crossing.places:
                groups[where.key].append((where, crossing))
        for key, group in groups.items():
            crossing = group[0][1]
            try:
                self._sites.places([where for where, _ in group])
            except CannotPlaceError:
                if key in self._impossible:
                    self._give_up(crossing.value, crossing.operations, crossing.way)
                self._impossible.add(key)
                raise _AgainError from None
            for _, other in group:
                if (other.way, other.dimension) != (crossing.way, crossing.dimension):
                    self._give_up(other.value, other.operations, other.way)

    def _return(self, found: SequenceCut) -> None:
        """Outputs of the model become whole."""
        sliced = {one.value.index for one in found.crossings if one.way == "slice"}
        for _, root in self._trace.runs:
            for path, value in root.outputs:
                if value.index in self._cut and value.index not in sliced:
                    dimension = found.dimension(value)
                    assert dimension is not None
                    found.returned.append((root, Where(root, path, True), value, dimension))

    def _check_use(self, found: SequenceCut) -> None:
        """Take parts of what is whole as early as that is of use: for all that one module does with it."""
        sliced = [one.value for one in found.crossings if one.way == "slice"]
        early = {
            value.index
            for value in sliced
            if value.differentiable and value.source.kind != "parameter" and self._sites.inputs(value)
        }
        if early - self._taken - self._left:
            self._taken |= early - self._left
            raise _AgainError

    def _check_draws(self) -> None:
        """A module draws random numbers for parts always, or never: ranks draw different ones for parts."""
        draws: dict[str, dict[bool, list[Operation]]] = defaultdict(lambda: {True: [], False: []})
        for operation in self._trace.operations:
            rule = self._axes.registry.find(operation.function)
            if rule is not None and rule.random and operation.module is not None:
                is_part = any(
                    value.index in self._cut or self._states.made_local(value) for value in operation.outputs
                )
                draws[operation.module.path][is_part].append(operation)
        mixed = [one[True] for one in draws.values() if one[True] and one[False]]
        refused = [operation for operations in mixed for operation in operations]
        if any(operation.index in self._parts for operation in refused):
            self._refuse(refused)
            raise _AgainError

    # ---------------------------------------------------------------- gradients

    def _parameters(self, found: SequenceCut) -> None:
        """What meets parts without being cut itself gets partial gradients."""
        partial: dict[int, list[Operation]] = defaultdict(list)
        chain: set[int] = set()
        for operation in reversed(self._trace.operations):
            if operation.index in self._parts:
                self._note_partial(operation, partial)
                continue
            results = [value for value in operation.outputs if partial.get(value.index)]
            if results and self._passes(operation, results, partial):
                chain.add(operation.index)
                for value in results:
                    del partial[value.index]
                self._note_partial(operation, partial)
        # what a layer adds after it has taken its part
        added = {
            (bias.index, use.index): use
            for index, (bias, module) in self._biases.items()
            if index in found.scattered
            for use in bias.uses
            if module.first <= use.index < module.last
        }
        for (index, _), use in added.items():
            partial[index].append(use)
        parts = self._parts | chain
        for index, operations in sorted(partial.items()):
            value = self._trace.values[index]
            if not operations:
                continue
            if value.source.kind == "parameter":
                self._check_reader(value, operations, parts, {use for _, use in added})
                found.partial.append((value, tuple(operations)))
            else:
                found.entered.append((value, tuple(operations)))

    def _note_partial(self, operation: Operation, partial: dict[int, list[Operation]]) -> None:
        for value in dict.fromkeys(operation.inputs):
            if value.differentiable and value.index not in self._cut and not self._has(value):
                partial[value.index].append(operation)

    def _passes(
        self, operation: Operation, results: list[Value], partial: dict[int, list[Operation]]
    ) -> bool:
        """Whether all gradients that come to the operation are partial and may go on to what it reads."""
        if self._regions[operation.index] or len(operation.outputs) != 1 or operation.call is None:
            return False
        if any(value in operation.inputs for value in operation.outputs):
            return False
        if any(value.index in self._cut or self._has(value) for value in operation.inputs):
            return False
        (value,) = results
        return value.index not in self._outputs and all(
            use in partial[value.index] or not any(one.differentiable for one in use.outputs)
            for use in value.uses
        )

    def _check_reader(
        self, parameter: Value, operations: list[Operation], parts: set[int], added: set[int]
    ) -> None:
        """A module that reads a parameter reads it for parts only."""
        readers = {operation.module.path for operation in operations if operation.module is not None}
        for use in parameter.uses:
            if use.module is None or use.module.path not in readers or use.index in parts | added:
                continue
            if any(one.differentiable for one in use.outputs):
                self._refuse(operations)
                self._keep_whole(
                    self._trace.values[index]
                    for index, (bias, _) in self._biases.items()
                    if bias is parameter and index in self._cut
                )
                raise _AgainError

    # ---------------------------------------------------------------- numbers

    def _check_numbers(self, found: SequenceCut) -> None:
        numbers = Numbers(self._trace, PartStates(self._selection, self._cut, found.crossings), self._cut)
        on_parts: dict[int, FunctionCall] = {}
        for index in self._parts:
            call = self._trace.operations[index].call
            assert call is not None
            on_parts[call.index] = call
        failing = {index for index, call in on_parts.items() if numbers.fails(call)}
        if failing:
            self._refused |= failing
            raise _AgainError
        misused = numbers.misused(call for call in self._trace.calls if call.index not in on_parts)
        if misused:
            # who takes the size of a whole may have it, if all get the whole
            again = misused & self._known_misused
            for index in again - self._taken:
                self._refuse(self._slices.get(index, ()))
            self._keep_whole(self._trace.values[index] for index in again)
            self._ended |= (misused - again) & self._cut
            self._known_misused |= misused
            raise _AgainError
