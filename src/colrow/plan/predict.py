"""What a plan will communicate and hold, before it is applied."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from colrow.layers.loss_chunks import tokens_per_chunk
from colrow.plan.borders import Borders
from colrow.plan.exits import Reductions
from colrow.plan.flow import GradientFlow
from colrow.plan.gradients import Summation
from colrow.plan.plan import Sharding
from colrow.plan.prediction import Direction, PredictedCollective, Prediction
from colrow.plan.recomputed import Recomputed
from colrow.plan.selection import Selection
from colrow.plan.sequence.cut import SequenceCut
from colrow.plan.sequence.lower import but_gathered
from colrow.plan.sites import Sites
from colrow.plan.states import States
from colrow.trace.records import ModuleCall, Operation, Value


def predict(
    selection: Selection,
    states: States,
    borders: Borders,
    reductions: Reductions,
    summations: list[Summation],
    parameters: Mapping[str, Sharding],
    frozen: Collection[str] = (),
    sequences: Sequence[SequenceCut] = (),
) -> Prediction:
    """Collectives of every traced run, and parameters of every rank.

    Args:
        frozen: names of parameters that are not trained: what only they would need is not communicated.
        sequences: what is cut between regions.
    """
    predictor = _Predictor(selection, states, borders, reductions, summations, parameters, frozen, sequences)
    return Prediction(predictor.collectives(), *_sizes(selection, parameters))


_LOSSES = ("aten._log_softmax", "aten.log_softmax")
"""Where the way of logits ends: what comes of them there is whole."""


def _at_once(tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    """For which tokens a fused loss has logits at once, in a pass with gradients."""
    count = prod(tokens)
    step = tokens_per_chunk(count)
    return [tokens] if step >= count else [(min(step, count - at),) for at in range(0, count, step)]


class _Predictor:
    """Counts collectives, one kind of place after the other.

    A place may stand in several of the traced runs. What is counted for all runs in which it stands goes
    through :meth:`_add`, what is counted for one run through :meth:`_count`. None of the methods needs what
    another has found: their order is that of the tables in which people read them.
    """

    def __init__(
        self,
        selection: Selection,
        states: States,
        borders: Borders,
        reductions: Reductions,
        summations: list[Summation],
        parameters: Mapping[str, Sharding],
        frozen: Collection[str],
        sequences: Sequence[SequenceCut],
    ) -> None:
        self._flow = GradientFlow(selection.trace, frozen)
        self._recomputed = Recomputed(selection.trace, self._flow)
        self._selection, self._states, self._borders = selection, states, borders
        self._trace = selection.trace
        self._reductions, self._parameters = reductions, parameters
        self._sequences = sequences
        self._scattered = {index for sequence in sequences for index in sequence.scattered}
        # sums of gradients: of parameters all together, of other values each where it enters a region
        summed = but_gathered(summations, sequences) + [
            Summation(value, operations, False)
            for sequence in sequences
            for value, operations in (*sequence.partial, *sequence.entered)
        ]
        self._entered = [one for one in summed if one.value.source.kind != "parameter"]
        self._partial_parameters = [one for one in summed if one.value.source.kind == "parameter"]
        self._found: Counter[PredictedCollective] = Counter()  # each with a count of one

    def collectives(self) -> tuple[PredictedCollective, ...]:
        """All of them."""
        self._exits()
        self._lookups()
        self._gathers()
        self._losses()
        self._shared_parameters()
        self._slices()
        self._along_sequences()
        self._parameters_in_regions()
        self._entries()
        return tuple(replace(one, count=count) for one, count in self._found.items())

    # ---------------------------------------------------------------- kinds of places

    def _exits(self) -> None:
        """Partial sums, where they are reduced."""
        for one in self._reductions.all:
            holder = one.module if one.call is not None else one.module.parent
            end = one.call.last if one.call is not None else one.module.last
            again = self._recomputed.times(holder, end - 1)
            varies = self._on_guesses(holder)
            self._sum(one.value, f"exit {one.module.path}", one.module.first, varies, again)

    def _lookups(self) -> None:
        """Rows of tables of which each rank has some."""
        for operation in self._trace.operations:
            if self._selection.looks_up(operation) and self._states.is_local(operation.inputs[0]):
                varies = self._on_guesses(operation.module)
                again = self._recomputed.times(operation.module, operation.index)
                label = f"lookup {_path(operation)}"
                self._sum(operation.outputs[0], label, operation.index, varies, again)

    def _sum(self, value: Value, label: str, at: int, varies: bool, again: int) -> None:
        """A partial sum that becomes whole, or each rank's part of a sequence."""
        if value.index not in self._scattered:
            self._add(value, "forward", "all-reduce", label, at, varies, again)
            return
        self._add(value, "forward", "reduce-scatter", label, at, varies, again)
        if self._flow.reaches(value):
            self._add(value, "backward", "all-gather", label, at, varies)

    def _gathers(self) -> None:
        """Parts that leave the model, and logits that no loss reads."""
        for value, module in (*self._borders.gathered, *self._borders.unread):
            again = self._recomputed.times(module.parent, module.last - 1)
            self._add(value, "forward", "all-gather", f"gather {module.path}", module.first, again=again)

    def _losses(self) -> None:
        for logits, module in self._borders.losses:
            self._loss(logits, module)

    def _loss(self, logits: Value, module: ModuleCall) -> None:
        """What happens between logits and their losses, of which there may be several.

        Of every token the largest logit, and two sums: of exponentials, and the logit of its label. Besides,
        gradients of what all ids are added to or multiplied with on their way.
        """
        way = {logits.index}
        for operation in self._trace.operations:
            if not way & {value.index for value in operation.inputs}:
                continue
            if operation.name in _LOSSES:
                self._loss_terms(operation, module)
                continue
            way.update(value.index for value in operation.outputs)
            others = [value for value in operation.inputs if value.index not in way]
            for value in others if self._flow.through(operation) else ():
                per_id = bool(value.shape) and value.shape[-1] == logits.shape[-1]
                if self._flow.reaches(value):
                    kind = "all-gather" if per_id else "all-reduce"
                    self._add(value, "backward", kind, "with the logits", operation.index)

    def _loss_terms(self, operation: Operation, module: ModuleCall) -> None:
        tokens = list(operation.inputs[0].shape)
        del tokens[int(operation.arguments[1])]  # the classes
        is_fused = self._borders.loss is not None and self._borders.loss.fused
        again = self._recomputed.times(operation.module, operation.index)
        for chunk in _at_once(tuple(tokens)) if is_fused else [tuple(tokens)]:
            for what, shape in (("max", chunk), ("sum", (*chunk, 2))):
                label, dtype = f"loss of {module.path} {what}", operation.inputs[0].dtype
                for mode in self._modes(operation.index):
                    self._count(mode, "forward", "all-reduce", label, shape, dtype)
                    for _ in range(again):
                        self._count(mode, "backward", "all-reduce", label, shape, dtype)

    def _shared_parameters(self) -> None:
        """Gradients of parameters of which several ranks hold the same part, in every run that reads them."""
        cuts = {one.name: one.cut for one in self._selection.chosen}
        for value in self._trace.values:
            sharding = self._parameters.get(value.source.name) if value.source.kind == "parameter" else None
            if sharding is None or not self._flow.reaches(value):
                continue
            shared: Counter[tuple[int, ...]] = Counter()
            for (low, high), members in sharding.layout.shared(cuts[sharding.axis]):
                shared[members] += high - low
            label, varies = f"parameter {value.source.name}", self._made_on_guesses(value)
            for members, extent in shared.items():
                size = list(value.shape)
                size[sharding.dimension] = extent
                for mode, root in self._trace.runs:
                    readers = {
                        use.module.index for use in self._uses(value.uses, root) if use.module is not None
                    }
                    for _ in readers:
                        shape, dtype = tuple(size), value.dtype
                        self._count(mode, "backward", "all-reduce", label, shape, dtype, varies, members)

    def _slices(self) -> None:
        """The gradients of values that are born whole, at each place where a part is taken."""
        sites = Sites(self._selection)
        for index, operations in self._states.slices.items():
            value = self._trace.values[index]
            for mode, root in self._trace.runs:
                inside = [one for one in operations if root.first <= one.index < root.last]
                if self._flow.reaches(value) and any(map(self._flow.through, inside)):
                    whole = [use for use in value.uses if use not in operations]
                    varies = self._made_on_guesses(value)
                    for _ in sites.readers(value, inside, not whole):
                        self._count_value(mode, value, "backward", "all-reduce", "part", varies)

    def _along_sequences(self) -> None:
        """What sequences that are cut between regions need besides."""
        for sequence in self._sequences:
            for crossing in sequence.crossings:
                value, at = crossing.value, crossing.operations[0].index
                varies = self._made_on_guesses(value)
                if crossing.way == "slice":
                    for where in crossing.places if self._flow.reaches(value) else ():
                        if any(self._flow.through(one) for one in crossing.read_after(where)):
                            self._add(value, "backward", "all-gather", f"slice {sequence.name}", at, varies)
                    continue
                again = self._recomputed.times(crossing.operations[0].module, at)
                self._add(value, "forward", "all-gather", f"gather {sequence.name}", at, varies, again)
                has_gradient = self._flow.reaches(value) and any(map(self._flow.through, crossing.operations))
                if has_gradient and crossing.way == "partial":
                    self._add(value, "backward", "reduce-scatter", f"gather {sequence.name}", at, varies)
                    if not again and self._trains(sequence.again.get(value.index, ())):
                        self._add(value, "backward", "all-gather", f"again {sequence.name}", at, varies)
            for root, _, value, _ in sequence.returned:
                self._add(value, "forward", "all-gather", f"gather {sequence.name}", root.first)

    def _parameters_in_regions(self) -> None:
        """Gradients of replicated parameters that are read in regions: summed together, by their types."""
        for mode, root in self._trace.runs:
            together: dict[torch.dtype, dict[int, Value]] = defaultdict(dict)
            for one in self._partial_parameters:
                if not self._flow.reaches(one.value):
                    continue
                uses = self._uses(one.operations, root)
                apart = {
                    use.module.index: use
                    for use in uses
                    if use.module is not None and self._recomputed.is_apart(use)
                }
                for use in apart.values():
                    label, varies = f"parameter {one.value.source.name}", self._on_guesses(use.module)
                    self._count_value(mode, one.value, "backward", "all-reduce", label, varies)
                if len(apart) < len(uses):
                    together[one.value.dtype][one.value.index] = one.value
            for dtype, values in together.items():
                shape = (sum(prod(value.shape) for value in values.values()),)
                varies = any(map(self._made_on_guesses, values.values()))
                label = "parameters read in regions"
                self._count(mode, "backward", "all-reduce", label, shape, dtype, varies)

    def _entries(self) -> None:
        """Gradients of whole values that enter regions."""
        for one in self._entered:
            varies = self._made_on_guesses(one.value)
            for mode, root in self._trace.runs if self._flow.reaches(one.value) else ():
                if self._uses(one.operations, root):
                    label = f"enter {_path(one.operations[0])}"
                    self._count_value(mode, one.value, "backward", "all-reduce", label, varies)

    # ---------------------------------------------------------------- questions

    def _modes(self, at: int) -> list[str]:
        """The runs that operator ``at`` is of, which is one."""
        return [mode for mode, root in self._trace.runs if root.first <= at < root.last]

    def _uses(self, operations: Iterable[Operation], root: ModuleCall) -> list[Operation]:
        """Those of a run through which gradients flow."""
        return [one for one in operations if root.first <= one.index < root.last and self._flow.through(one)]

    def _trains(self, layers: Iterable[str]) -> bool:
        """Whether the weight of one of the layers gets a gradient."""
        weights = {f"{path}.weight" for path in layers}
        return any(
            value.source.name in weights and self._flow.reaches(value)
            for value in self._trace.values
            if value.source.kind == "parameter"
        )

    def _on_guesses(self, module: ModuleCall | None) -> bool:
        """Whether what the module's code does depends on data that was guessed."""
        while module is not None and module.path not in self._trace.guessed:
            module = module.parent
        return module is not None

    def _made_on_guesses(self, value: Value) -> bool:
        if value.source.kind == "parameter":
            return any(self._on_guesses(use.module) for use in value.uses)
        return value.producer is not None and self._on_guesses(value.producer.module)

    # ---------------------------------------------------------------- counting

    def _add(
        self,
        value: Value,
        direction: Direction,
        kind: str,
        label: str,
        at: int,
        varies: bool = False,
        again: int = 0,
    ) -> None:
        """One collective of the run that operator ``at`` is of; in its backward pass so often ``again``."""
        for mode in self._modes(at):
            self._count_value(mode, value, direction, kind, label, varies)
            for _ in range(again):
                self._count_value(mode, value, "backward", kind, label, varies)

    def _count_value(
        self, mode: str, value: Value, direction: Direction, kind: str, label: str, varies: bool
    ) -> None:
        self._count(mode, direction, kind, label, value.shape, value.dtype, varies)

    def _count(
        self,
        mode: str,
        direction: Direction,
        kind: str,
        label: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        varies: bool = False,
        members: tuple[int, ...] = (),
    ) -> None:
        """One more."""
        label = re.sub(r"(?<![^. ])[0-9]+(?![^.])", "*", label)
        size = prod(shape) * dtype.itemsize
        self._found[PredictedCollective(mode, direction, kind, label, shape, size, 1, members, varies)] += 1


def _path(operation: Operation) -> str:
    return operation.module.path if operation.module is not None else ""


def _sizes(
    selection: Selection, parameters: Mapping[str, Sharding]
) -> tuple[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]]:
    """Numbers and bytes of parameters: of the whole model, and held by each rank."""
    cuts = {one.name: one.cut for one in selection.chosen}
    ranks = selection.ranks
    elements, sizes = [0] * ranks, [0] * ranks
    whole = whole_bytes = 0
    local: dict[tuple[Sharding, int], int] = {}
    for value in selection.trace.values:
        if value.source.kind != "parameter":
            continue
        count = prod(value.shape)
        whole += count
        whole_bytes += count * value.dtype.itemsize
        sharding = parameters.get(value.source.name)
        for rank in range(ranks):
            mine = count
            if sharding is not None:
                if (sharding, rank) not in local:
                    local[sharding, rank] = sharding.layout.local_size(cuts[sharding.axis], rank)
                mine = count // sharding.layout.size * local[sharding, rank]
            elements[rank] += mine
            sizes[rank] += mine * value.dtype.itemsize
    return (whole, tuple(elements)), (whole_bytes, tuple(sizes))
