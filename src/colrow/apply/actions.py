"""Doing what a plan says to one model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from colrow.apply.calls import CallTable, local_number
from colrow.apply.fast_path import keep_off_fast_path
from colrow.apply.kept_parts import KeptParts
from colrow.apply.loss import ParallelLoss
from colrow.apply.parameters import change_readers, shard
from colrow.apply.parts import Part, TakePart, TakeWhole
from colrow.apply.regions import Forgetting, Scope, common_module, find_regions
from colrow.apply.sequence import GatherSequence, ScatterSequence, SequenceLength, SliceSequence
from colrow.apply.values import Change, ModuleTable
from colrow.collectives import AllReduce, Communicator, Enter
from colrow.forwards import Watch
from colrow.layers import (
    SharedEntry,
    VocabParallelEmbedding,
    column_parallel,
    lookup,
    multiply_faster,
    row_parallel,
)
from colrow.layers.entry import LayerEntry
from colrow.layers.linear import ColumnParallel, RowParallel
from colrow.layout import Cut
from colrow.modules import embedding_fault, features_dimension, is_linear
from colrow.plan import (
    Along,
    CallArgument,
    CallResult,
    Entry,
    Exit,
    LocalAttribute,
    Lookup,
    ModuleInput,
    ModuleOutput,
    OwnRandomness,
    Place,
    Plan,
    SequenceGather,
    SequenceSlice,
    Sharding,
)
from colrow.randomness import RegionRandomness
from colrow.undo import Undo

_SIZES = ("in_features", "out_features", "nf", "nx", "num_embeddings")


class Passed:
    """Which places of a plan a model has passed since it was applied, in case somebody asks."""

    def __init__(self) -> None:
        self._expected: dict[Place, None] = {}
        self._seen: set[Place] = set()

    def watching(self, place: Place, change: Callable[..., Any]) -> Callable[..., Any]:
        """The same change, which takes note that ``place`` was passed."""
        self._expected[place] = None

        def noting(*given: Any, **named: Any) -> Any:
            self._seen.add(place)
            return change(*given, **named)

        return noting

    def missing(self) -> list[Place]:
        """The places that were not."""
        return [place for place in self._expected if place not in self._seen]


class Applier:
    """Does what ``plan`` says to ``model`` on one rank; ``passed`` then knows what the model passes of it."""

    def __init__(
        self, model: nn.Module, ranks: Communicator, plan: Plan, passed: Passed | None = None
    ) -> None:
        self._model, self._ranks, self._plan, self._passed = model, ranks, plan, passed
        self._undo = Undo(model)
        self._modules, self._calls = ModuleTable(model), CallTable(model)
        self._region = RegionRandomness(ranks)
        self.lengths: dict[str, SequenceLength] = {}
        self._of_layers: list[SharedEntry | KeptParts] = []

    def apply(self, gather_logits: bool) -> Undo:
        """Do it; what is returned takes it back, but for the parameters' data."""
        plan = self._plan
        sizes = {id(module): _sizes(module) for module in self._model.modules()}
        for sequence_gather in plan.sequence_gathers:
            self._sequence_gather(sequence_gather)
        for sequence_slice in plan.sequence_slices:
            self._change(sequence_slice.place, self._sequence_slice(sequence_slice))
        entries = self._entries()
        for exit in plan.exits:
            self._exit(exit)
        for lookup_ in plan.lookups:
            self._lookup(lookup_)
        if not plan.by_hand:
            # other code may read them: the plan says which numbers become local
            for module in self._model.modules():
                vars(module).update(sizes[id(module)])
        if plan.by_hand:
            self._regions(entries)
        shard(self._model, self._ranks, plan)
        change_readers(self._model, self._ranks, plan)
        for piece in plan.slices:
            self._change(piece.place, TakePart(*self._placed_part(piece.place, piece.sharding)))
        for gather in plan.gathers:
            if gather_logits or gather.always or not self._is_logits(gather.place):
                self._change(gather.place, TakeWhole(*self._placed_part(gather.place, gather.sharding)))
        for attribute in plan.attributes:
            self._localise(attribute)
        for integer in plan.integers:
            rank = self._ranks.rank
            change = self._noted(
                integer.place, local_number(integer.given[rank], integer.values[rank], integer.place)
            )
            changes = self._calls.at(integer.place.module).at(integer.place.call)
            changes.integers.append((integer.place.path, change))
        for own in plan.randomness:
            self._own_randomness(own)
        self._calls.attach()
        self._modules.attach()
        Watch(self._model)
        if plan.loss is not None:
            self._loss(gather_logits)
        keep_off_fast_path(self._model, plan)
        multiply_faster(self._model, self._ranks)
        self._undo.seal(self._model)
        return self._undo

    # ---------------------------------------------------------------- regions

    def _entries(self) -> dict[Entry, SharedEntry]:
        shared: dict[Entry, SharedEntry] = {}
        for entry in self._plan.entries:
            label = f"enter {', '.join(dict.fromkeys(entry.modules))}"
            linears = [path for place in entry.places if (path := self._column(place)) is not None]
            alone = len(entry.places) == 1 and not entry.repeated
            if alone and linears:
                # a layer that enters alone overlaps the reduction with its own weight gradient
                self._column_parallel(linears[0], None)
            elif alone and not isinstance(entry.places[0], CallArgument | CallResult):
                self._change(entry.places[0], Enter(self._ranks, label))
            else:
                members = 0 if entry.repeated else self._members(entry.places)
                shared[entry] = SharedEntry(self._ranks, label, members)
                self._share(entry, shared[entry])
        if self._of_layers:  # a layer that was not called may have left something
            self._model.register_forward_hook(Forgetting(*self._of_layers), always_call=True)
        return shared

    def _sequence_gather(self, gather: SequenceGather) -> None:
        label = f"gather {', '.join(dict.fromkeys(gather.modules))}"
        dst: Literal["I", "R"] = "R" if gather.gradient == "partial" else "I"
        length, members = self._length(gather.along), self._members(gather.places)
        shared = GatherSequence(length, label, gather.along.dimension, dst, members)
        if gather.again:
            given_parts = all(
                isinstance(one, ModuleInput) and one.module in gather.again for one in gather.places
            )
            shared.readers = KeptParts(shared, shared.enter, given_parts)
            self._of_layers.append(shared.readers)
            for path in gather.again:
                self._column_parallel(path, shared.readers)
            if given_parts:
                return
        self._share(gather, shared)

    def _sequence_slice(self, piece: SequenceSlice) -> Change:
        label = f"part of {piece.place.module or 'the model'}"
        return SliceSequence(self._length(piece.along), label, piece.along.dimension)

    def _scatter(self, along: Along, label: str) -> ScatterSequence:
        return ScatterSequence(self._length(along), label, along.dimension)

    def _length(self, along: Along) -> SequenceLength:
        return self.lengths.setdefault(along.sequence, SequenceLength(self._ranks, along.sequence))

    def _members(self, places: Sequence[Place]) -> int:
        """How many read what places share; 0 if calls do, of which there is no telling."""
        return 0 if any(isinstance(place, CallArgument | CallResult) for place in places) else len(places)

    def _share(self, action: Entry | SequenceGather, entry: SharedEntry) -> None:
        """Let all places of an action share ``entry``."""
        linears = [path for place in action.places if (path := self._column(place)) is not None]
        if len(linears) == len(action.places):
            self._of_layers.append(entry)
            for path in linears:
                self._column_parallel(path, entry)
            return
        for place in action.places:
            self._change(place, entry)
        if isinstance(action, Entry) and action.repeated:
            self._of_layers.append(entry)
        calling = {one.module for one in action.places if isinstance(one, CallArgument | CallResult)}
        if calling:
            self._forget_after(action.modules, calling, entry)

    def _column_parallel(self, path: str, entry: LayerEntry | None) -> None:
        module = self._model.get_submodule(path)
        column_parallel(module, self._ranks, entry=entry, label=path, **self._placed(path))

    def _forget_after(self, modules: Iterable[str], calling: Container[str], entry: SharedEntry) -> None:
        """Let go of what was entered when the innermost module that holds all its places has ended."""
        common = common_module(modules)
        if common in calling:
            self._calls.at(common).afterwards(entry.forget)
        else:
            holder = self._model.get_submodule(common)
            holder.register_forward_hook(Forgetting(entry), always_call=True)

    def _column(self, place: Place) -> str | None:
        """The path of a linear layer whose input it is and whose output features are cut."""
        if not isinstance(place, ModuleInput) or len(place.path) != 1:
            return None
        module = self._model.get_submodule(place.module)
        sharding = self._plan.parameters.get(f"{place.module}.weight")
        if not is_linear(module) or sharding is None or sharding.dimension != features_dimension(module):
            return None
        return place.module

    def _exit(self, exit: Exit) -> None:
        place, label = exit.place, f"exit {exit.place.module}"
        scatter = None if exit.along is None else self._scatter(exit.along, label)
        module = self._model.get_submodule(place.module)
        if isinstance(place, ModuleOutput) and is_linear(module):
            sharding = self._plan.parameters.get(f"{place.module}.weight")
            if sharding is not None and sharding.dimension != features_dimension(module):
                row_parallel(
                    module, self._ranks, label=place.module, scatter=scatter, **self._placed(place.module)
                )
                return
        self._change(place, scatter or AllReduce(self._ranks, label))

    def _lookup(self, action: Lookup) -> None:
        place, path = action.place, action.place.module
        module = self._model.get_submodule(path)
        if isinstance(place, ModuleOutput) and embedding_fault(module) is None:
            VocabParallelEmbedding.from_module(
                cast(nn.Embedding, module),
                self._ranks,
                label=path,
                scatter=None if action.along is None else self._scatter(action.along, f"lookup {path}"),
                **self._placed(path),
            )
            return
        assert isinstance(place, CallResult)
        cut = self._plan.axes[action.axis].cut
        changes = self._calls.at(path).at(place.call)
        changes.replacement = self._noted(place, lookup(self._ranks, cut, path))

    def _placed(self, path: str) -> dict[str, Any]:
        sharding = self._plan.parameters[f"{path}.weight"]
        return {"layout": sharding.layout, "cut": self._plan.axes[sharding.axis].cut}

    def _regions(self, entries: dict[Entry, SharedEntry]) -> None:
        """Random numbers differ by rank between the layers that enter and leave a region."""
        for region in find_regions(self._plan, self._model):
            for path in region.columns:
                cast(ColumnParallel, self._model.get_submodule(path)).begin_region(self._region, region.name)
            for path in region.exits:
                cast(RowParallel, self._model.get_submodule(path)).end_region(self._region, region.name)
            scope = Scope(region.name, self._region, entries.get(region.entry))
            scope.attach(self._model.get_submodule(region.scope))

    def _own_randomness(self, own: OwnRandomness) -> None:
        module = self._model.get_submodule(own.module)
        scope = OwnScope(own.module or "the model", self._region, own.always)
        scope.attach(module, [self._model.get_submodule(one) for one in own.whole])

    # ---------------------------------------------------------------- values and numbers

    def _noted(self, place: Place, change: Callable[..., Any]) -> Callable[..., Any]:
        return change if self._passed is None else self._passed.watching(place, change)

    def _change(self, place: Place, change: Change) -> None:
        if isinstance(place, ModuleInput):
            # given by position in one call and by name in another, an argument has two places
            kind = Enter if isinstance(change, SharedEntry) else type(change)
            if not self._modules.at(place.module).is_first(place.path, kind):
                return
        change = self._noted(place, change)
        match place:
            case ModuleInput(module, path):
                self._modules.at(module).change_input(path, change)
            case ModuleOutput(module, path):
                self._modules.at(module).change_output(path, change)
            case CallArgument(module, call, path):
                self._calls.at(module).at(call).arguments.append((path, change))
            case CallResult(module, call, path):
                self._calls.at(module).at(call).results.append((path, change))

    def _placed_part(self, place: Place, sharding: Sharding) -> tuple[Communicator, str, int, Part]:
        part = Part(sharding.layout, self._plan.axes[sharding.axis].cut, str(place))
        return self._ranks, f"part of {place.module or 'the model'}", sharding.dimension, part

    def _is_logits(self, place: Place) -> bool:
        """Whether it is what a layer gives, rather than an output of the model for other reasons."""
        return place.module != ""

    def _localise(self, attribute: LocalAttribute) -> None:
        module = self._model.get_submodule(attribute.module)
        *path, last = attribute.attribute.split(".")
        holder: object = module
        for name in path:
            duplicate = copy.copy(getattr(holder, name))
            setattr(holder, name, duplicate)
            holder = duplicate
        setattr(holder, last, attribute.values[self._ranks.rank])

    def _loss(self, gather_logits: bool) -> None:
        loss = self._plan.loss
        assert loss is not None
        sharding = self._plan.parameters[f"{loss.logits}.weight"]
        layer = self._model.get_submodule(loss.logits)
        if is_linear(layer):  # its input is entered elsewhere
            before = _sizes(layer)
            column_parallel(layer, self._ranks, reads="R", label=loss.logits, **self._placed(loss.logits))
            vars(layer).update(before)
        cut = self._plan.axes[loss.axis].cut
        sizes = [sharding.layout.local_size(cut, rank) for rank in range(self._plan.ranks)]
        ParallelLoss(loss, self._ranks, Cut.from_counts(sizes), gather_logits).attach(
            self._model, self._undo.added_hooks(self._model)
        )


class OwnScope:
    """Hooks on a module that draws random numbers for parts, and on those in it that draw for wholes."""

    def __init__(self, name: str, randomness: RegionRandomness, always: bool) -> None:
        self._name, self._randomness, self._always = name, randomness, always

    def attach(self, module: nn.Module, whole: list[nn.Module]) -> None:
        """Hook the modules."""
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end, always_call=True)
        for inner in whole:
            inner.register_forward_pre_hook(self._pause)
            inner.register_forward_hook(self._resume, always_call=True)

    def _begin(self, module: nn.Module, arguments: Any) -> None:
        draws = self._always or module.training or any(child.training for child in module.modules())
        self._randomness.begin_scope(self._name, draws)
        if draws:
            self._randomness.enter(_device(module, arguments), self._name)

    def _end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._randomness.leave(self._name)
        self._randomness.end_scope()

    def _pause(self, module: nn.Module, arguments: Any) -> None:
        self._randomness.pause()

    def _resume(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._randomness.resume()


def _sizes(module: nn.Module) -> dict[str, Any]:
    """The numbers by which a layer knows its size."""
    return {name: vars(module)[name] for name in _SIZES if name in vars(module)}


def _device(module: nn.Module, arguments: Any) -> torch.device:
    """Where a module computes."""
    for tensor in [*module.parameters(), *(one for one in arguments if isinstance(one, Tensor))]:
        return tensor.device
    return torch.get_default_device()
