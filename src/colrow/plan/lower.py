"""From what has to happen to the values of a trace to the actions of a plan."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from colrow.modules import embedding_fault, is_linear
from colrow.plan.borders import Borders
from colrow.plan.exits import Reductions, paths_of
from colrow.plan.gradients import Summation
from colrow.plan.layer_inputs import layer_inputs
from colrow.plan.places import CallResult, ModuleOutput, Place
from colrow.plan.plan import (
    Along,
    Entry,
    Exit,
    Lookup,
    OnceParameter,
    OwnRandomness,
    PartialParameter,
    PartSlice,
    SequenceGather,
    SequenceSlice,
)
from colrow.plan.selection import CannotPlaceError, UnreachableError
from colrow.plan.sequence.cut import SequenceCut
from colrow.plan.sequence.lower import along_of, but_gathered, lower_sequences
from colrow.plan.sites import Sites, Where, merged
from colrow.plan.states import States
from colrow.trace.records import ModuleCall, Operation, Value


@dataclass
class Actions:
    """The actions of a plan on values and parameters."""

    entries: list[Entry] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    slices: list[PartSlice] = field(default_factory=list)
    sequence_gathers: list[SequenceGather] = field(default_factory=list)
    sequence_slices: list[SequenceSlice] = field(default_factory=list)
    partial_parameters: list[PartialParameter] = field(default_factory=list)
    once_parameters: list[OnceParameter] = field(default_factory=list)
    randomness: list[OwnRandomness] = field(default_factory=list)


def lower(
    model: nn.Module,
    states: States,
    borders: Borders,
    reductions: Reductions,
    summations: list[Summation],
    sequences: Sequence[SequenceCut] = (),
) -> Actions:
    """The actions that do it.

    Args:
        sequences: what is cut between regions.

    Raises:
        UnreachableError: if gradients would have to be summed where nothing can be done.
        CannotPlaceError: if something else would have to happen there.
    """
    return _Lowering(model, states, borders, reductions, summations, sequences).run()


class _Lowering:
    def __init__(
        self,
        model: nn.Module,
        states: States,
        borders: Borders,
        reductions: Reductions,
        summations: list[Summation],
        sequences: Sequence[SequenceCut],
    ) -> None:
        self._model, self._states, self._borders = model, states, borders
        self._reductions = reductions
        self._summations = but_gathered(summations, sequences)
        self._sequences = sequences
        self._selection = states.selection
        self._sites = Sites(states.selection)
        self._actions = Actions()

    def run(self) -> Actions:
        self._lookups()
        self._exits()
        self._once()
        self._entries()
        self._partial_parameters()
        self._slices()
        self._randomness()
        lower_sequences(self._sequences, self._sites, self._actions)
        return self._actions

    # ---------------------------------------------------------------- forward

    def _lookups(self) -> None:
        found: dict[tuple[object, ...], list[tuple[Where, str, Along | None]]] = defaultdict(list)
        for operation in self._selection.trace.operations:
            if not self._selection.looks_up(operation):
                continue
            table = operation.inputs[0]
            local = [value for value in operation.inputs if self._states.is_local(value)]
            if not local:
                continue
            if operation.name != "aten.embedding" or table.source.kind != "parameter" or local != [table]:
                raise self._selection.cannot("there is no lookup in a part of such a table", operation)
            chosen = self._selection.chosen_of(table)
            assert chosen is not None
            where, along = self._lookup(operation), along_of(operation.outputs[0], self._sequences)
            found[where.key].append((where, chosen.name, along))
        for group in found.values():
            for place in self._sites.places([where for where, _, _ in group]):
                assert isinstance(place, ModuleOutput | CallResult)
                self._actions.lookups.append(Lookup(place, group[0][1], group[0][2]))

    def _lookup(self, operation: Operation) -> Where:
        module, result = operation.module, operation.outputs[0]
        if module is not None:
            own = self._model.get_submodule(module.path)
            paths = [path for path, value in module.outputs if value is result]
            if paths and embedding_fault(own) is None:
                return Where(module, paths[0], True)
        call = operation.call
        paths = [] if call is None else [path for path, value in paths_of(call.outputs) if value is result]
        if call is None or not paths or call.name != "embedding":
            raise self._selection.cannot("a lookup that is no call of embedding", operation)
        return Where(call.module, paths[0], True, call)

    def _exits(self) -> None:
        found: dict[tuple[object, ...], list[tuple[Where, Along | None]]] = defaultdict(list)
        for one in self._reductions.all:
            where = Where(one.module, one.path, True, one.call)
            found[where.key].append((where, along_of(one.value, self._sequences)))
        for group in found.values():
            for place in self._sites.places([where for where, _ in group]):
                assert isinstance(place, ModuleOutput | CallResult)
                self._actions.exits.append(Exit(place, group[0][1]))

    def _once(self) -> None:
        exits = {one.place for one in self._actions.exits}
        found: dict[OnceParameter, list[ModuleCall]] = defaultdict(list)
        for parameter, module in self._reductions.once:
            own = self._model.get_submodule(module.path)
            if is_linear(own) and ModuleOutput(module.path) in exits:
                continue  # the layer adds its bias after the reduction
            self._check_read(parameter)
            found[OnceParameter(parameter.source.name, module.path)].append(module)
        for action, modules in found.items():
            if len({id(one) for one in modules}) != len(self._sites.calls_of_module(action.reader)):
                raise self._selection.cannot(
                    f"calls of {action.reader} differ in whether {action.name} is added once",
                    *self._selection.trace.operations[modules[0].first : modules[0].last],
                )
            self._actions.once_parameters.append(action)

    def _slices(self) -> None:
        found: dict[tuple[object, ...], list[tuple[Where, Value]]] = defaultdict(list)
        by_index = self._selection.trace.values
        for index, operations in self._states.slices.items():
            value = by_index[index]
            reads_whole = [use for use in value.uses if use not in operations]
            for where in self._sites.readers(value, operations, not reads_whole):
                found[where.key].append((where, value))
        for group in found.values():
            sharding = self._selection.sharding(group[0][1])
            for place in self._sites.places([where for where, _ in group]):
                self._actions.slices.append(PartSlice(place, sharding))

    # ---------------------------------------------------------------- backward

    def _entries(self) -> None:
        """Each at the result that it concerns, or else where that is read."""
        impossible: set[tuple[object, ...]] = set()
        while True:
            try:
                return self._entries_without(impossible)
            except UnreachableError as error:
                if error.key is None or error.key in impossible:
                    raise
                impossible.add(error.key)

    def _entries_without(self, impossible: Collection[tuple[object, ...]]) -> None:
        found: dict[tuple[object, ...], list[Where]] = defaultdict(list)
        values: dict[tuple[object, ...], set[int]] = defaultdict(set)
        together: list[set[tuple[object, ...]]] = []
        repeated: set[tuple[object, ...]] = set()
        layers = layer_inputs(self._model, self._selection, self._sites, self._summations)
        for one in self._summations:
            if one.value.source.kind == "parameter":
                continue
            acting = layers.get(one.value.index, [])
            if not acting:
                with _reaching({one.value.index}):
                    acting = self._sites.readers(one.value, one.operations, one.everywhere, impossible)
            for where in acting:
                found[where.key].append(where)
                values[where.key].add(one.value.index)
            together.append({where.key for where in acting})
            times = Counter(where.key for where in acting if not where.is_result)
            repeated |= {key for key, count in times.items() if count > 1}
        entries: list[Entry] = []
        for keys in merged(together):
            places: list[Place] = []
            for key in (key for key in found if key in keys):
                with _reaching(values[key], key if found[key][0].is_result else None):
                    places += self._sites.places(found[key])
            entries.append(Entry(tuple(places), not repeated.isdisjoint(keys)))
        self._actions.entries += entries

    def _partial_parameters(self) -> None:
        found: dict[PartialParameter, list[Summation]] = defaultdict(list)
        for one in self._summations:
            if one.value.source.kind == "parameter":
                for operation in one.operations:
                    reader = operation.module
                    assert reader is not None
                    action = PartialParameter(one.value.source.name, reader.path)
                    if one not in found[action]:
                        found[action].append(one)
        for action, summations in found.items():
            self._check_reader(action, summations)
            self._actions.partial_parameters.append(action)
        self._actions.partial_parameters += self._shared_parameters()

    def _shared_parameters(self) -> list[PartialParameter]:
        """Those that are cut so that several ranks hold the same part."""
        found: dict[PartialParameter, None] = {}
        for value in self._selection.trace.values:
            chosen = self._selection.chosen_of(value)
            if value.source.kind != "parameter" or chosen is None or not value.differentiable:
                continue
            if self._selection.sharding(value).layout.is_shared(chosen.cut):
                self._check_read(value)
                for use in value.uses:
                    if use.module is not None:
                        found[PartialParameter(value.source.name, use.module.path)] = None
        return list(found)

    def _check_read(self, parameter: Value) -> None:
        if parameter.index not in self._selection.trace.read:
            raise self._selection.cannot(
                f"{parameter.source.name} is not read as an attribute of its module, but from a list, by "
                "named_parameters() or the like",
                *parameter.uses[:1],
            )

    def _check_reader(self, action: PartialParameter, summations: list[Summation]) -> None:
        """Whether all that the module computes with the parameter gives partial gradients.

        It has to read the parameter as an attribute: that is where it gets the one whose gradient is summed.
        """
        self._check_read(summations[0].value)
        partial = {operation.index for one in summations for operation in one.operations}
        for module in self._sites.calls_of_module(action.reader):
            for use in summations[0].value.uses:
                inside = module.first <= use.index < module.last and use.index not in partial
                if inside and any(one.differentiable for one in use.outputs):
                    raise self._selection.cannot(
                        f"{action.name} is read inside of a region and outside by the same module", use
                    )

    # ---------------------------------------------------------------- random numbers

    def _in_training(self, operation: Operation) -> bool:
        """Whether an operation is of a run in training mode."""
        return any(
            mode == "training" and root.first <= operation.index < root.last
            for mode, root in self._selection.trace.runs
        )

    def _randomness(self) -> None:
        registry = self._selection.axes.registry
        kinds: dict[str, set[bool]] = defaultdict(set)
        first: dict[str, Operation] = {}
        always: set[str] = set()
        for operation in self._selection.trace.operations:
            rule = registry.find(operation.function)
            if rule is not None and rule.random and operation.module is not None:
                local = any(
                    self._states.made_local(value) or along_of(value, self._sequences) is not None
                    for value in operation.outputs
                )
                kinds[operation.module.path].add(local)
                if local and not self._in_training(operation):
                    always.add(operation.module.path)
                first.setdefault(operation.module.path, operation)
        for path, found in kinds.items():
            if len(found) > 1:
                raise self._selection.cannot(
                    f"{path or 'the model'} draws random numbers for parts and for whole values", first[path]
                )
        own = [path for path, found in kinds.items() if True in found]
        for path in own:
            if not any(_is_inside(path, other) for other in own):
                whole = [one for one, found in kinds.items() if False in found and _is_inside(one, path)]
                draws = any(one == path or _is_inside(one, path) for one in always)
                self._actions.randomness.append(OwnRandomness(path, tuple(whole), draws))


@contextmanager
def _reaching(values: Iterable[int], key: tuple[object, ...] | None = None) -> Iterator[None]:
    """A context in which it is known for which values no place was found, and which result is none."""
    try:
        yield
    except CannotPlaceError as error:
        raise UnreachableError(error, values, key) from error


def _is_inside(path: str, other: str) -> bool:
    """Whether the module at ``path`` is a part of the one at ``other``."""
    return path != other and (not other or path.startswith(f"{other}."))
