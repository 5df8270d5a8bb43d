"""What a plan will communicate and hold, before it is applied."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from colrow.trace.records import ModuleCall, Value


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
    return _Predictor(selection, states, borders, reductions, summations, parameters, frozen, sequences).run()


_LOSSES = ("aten._log_softmax", "aten.log_softmax")
"""Where the way of logits ends: what comes of them there is whole."""


def _at_once(tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    """For which tokens a fused loss has logits at once, in a pass with gradients."""
    count = prod(tokens)
    step = tokens_per_chunk(count)
    return [tokens] if step >= count else [(min(step, count - at),) for at in range(0, count, step)]


_Kind = tuple[str, Direction, str, str, tuple[int, ...], int, tuple[int, ...], bool]


class _Predictor:
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
        self._reductions, self._parameters = reductions, parameters
        self._summations = but_gathered(summations, sequences) + [
            Summation(value, operations, False)
            for sequence in sequences
            for value, operations in (*sequence.partial, *sequence.entered)
        ]
        self._sequences = sequences
        self._scattered = {index for sequence in sequences for index in sequence.scattered}
        self._found: Counter[_Kind] = Counter()

    def run(self) -> Prediction:
        for one in self._reductions.all:
            holder = one.module if one.call is not None else one.module.parent
            end = one.call.last if one.call is not None else one.module.last
            again = self._recomputed.times(holder, end - 1)
            varies = self._on_guesses(holder)
            self._sum(one.value, f"exit {one.module.path}", one.module.first, varies, again)
        for operation in self._selection.trace.operations:
            if self._selection.looks_up(operation) and self._states.is_local(operation.inputs[0]):
                path = operation.module.path if operation.module is not None else ""
                varies = self._on_guesses(operation.module)
                again = self._recomputed.times(operation.module, operation.index)
                self._sum(operation.outputs[0], f"lookup {path}", operation.index, varies, again)
        for value, module in (*self._borders.gathered, *self._borders.unread):
            again = self._recomputed.times(module.parent, module.last - 1)
            label = f"gather {module.path}"
            self._add(value, "forward", "all-gather", label, module.first, again=again)
        for value, module in self._borders.losses:
            self._loss(value, module)
        self._shared_gradients()
        self._slices()
        self._along_sequences()
        self._partial_parameters()
        for summation in self._summations:
            if summation.value.source.kind == "parameter":
                continue
            operation = summation.operations[0]
            path = operation.module.path if operation.module is not None else ""
            varies = self._made_on_guesses(summation.value)
            for mode in self._modes(summation):
                self._count(mode, summation.value, "backward", "all-reduce", f"enter {path}", varies)
        return Prediction(self._collectives(), *self._sizes())

    def _sum(self, value: Value, label: str, at: int, varies: bool, again: int) -> None:
        """A partial sum that becomes whole, or each rank's part of a sequence."""
        if value.index not in self._scattered:
            self._add(value, "forward", "all-reduce", label, at, varies, again)
            return
        self._add(value, "forward", "reduce-scatter", label, at, varies, again)
        if self._flow.reaches(value):
            self._add(value, "backward", "all-gather", label, at, varies)

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

    def _trains(self, layers: Iterable[str]) -> bool:
        """Whether the weight of one of the layers gets a gradient."""
        weights = {f"{path}.weight" for path in layers}
        return any(
            value.source.name in weights and self._flow.reaches(value)
            for value in self._selection.trace.values
            if value.source.kind == "parameter"
        )

    def _loss(self, logits: Value, module: ModuleCall) -> None:
        """What happens between logits and their losses, of which there may be several.

        Of every token the largest logit, and two sums: of exponentials, and the logit of its label. Besides,
        gradients of what all ids are added to or multiplied with on their way.
        """
        way, loss = {logits.index}, self._borders.loss
        for operation in self._selection.trace.operations:
            if not way & {value.index for value in operation.inputs}:
                continue
            if operation.name in _LOSSES:
                together = list(operation.inputs[0].shape)
                del together[int(operation.arguments[1])]  # the classes
                is_fused = loss is not None and loss.fused
                for tokens in _at_once(tuple(together)) if is_fused else [tuple(together)]:
                    for what, shape in (("max", tokens), ("sum", (*tokens, 2))):
                        label = f"loss of {module.path} {what}"
                        again = self._recomputed.times(operation.module, operation.index)
                        self._add_one(label, shape, operation.inputs[0].dtype, operation.index, again)
                continue
            way.update(value.index for value in operation.outputs)
            others = [value for value in operation.inputs if value.index not in way]
            for value in others if self._flow.through(operation) else ():
                per_id = bool(value.shape) and value.shape[-1] == logits.shape[-1]
                if self._flow.reaches(value):
                    kind = "all-gather" if per_id else "all-reduce"
                    self._add(value, "backward", kind, "with the logits", operation.index)

    def _add_one(self, label: str, shape: tuple[int, ...], dtype: torch.dtype, at: int, again: int) -> None:
        for mode, root in self._selection.trace.runs:
            if root.first <= at < root.last:
                self._count_one(mode, "forward", "all-reduce", label, shape, dtype, ())
                for _ in range(again):
                    self._count_one(mode, "backward", "all-reduce", label, shape, dtype, ())

    def _slices(self) -> None:
        """The gradients of values that are born whole, at each place where a part is taken."""
        sites = Sites(self._selection)
        for index, operations in self._states.slices.items():
            value = self._selection.trace.values[index]
            for mode, root in self._selection.trace.runs:
                inside = [one for one in operations if root.first <= one.index < root.last]
                if self._flow.reaches(value) and any(map(self._flow.through, inside)):
                    whole = [use for use in value.uses if use not in operations]
                    varies = self._made_on_guesses(value)
                    for _ in sites.readers(value, inside, not whole):
                        self._count(mode, value, "backward", "all-reduce", "part", varies)

    def _shared_gradients(self) -> None:
        """Of parameters of which several ranks hold the same part, in every run that reads them."""
        cuts = {one.name: one.cut for one in self._selection.chosen}
        for value in self._selection.trace.values:
            sharding = self._parameters.get(value.source.name) if value.source.kind == "parameter" else None
            if sharding is None or not self._flow.reaches(value):
                continue
            shared: Counter[tuple[int, ...]] = Counter()
            for (low, high), members in sharding.layout.shared(cuts[sharding.axis]):
                shared[members] += high - low
            for members, extent in shared.items():
                shape = list(value.shape)
                shape[sharding.dimension] = extent
                for mode, root in self._selection.trace.runs:
                    inside = [
                        use
                        for use in value.uses
                        if root.first <= use.index < root.last and self._flow.through(use)
                    ]
                    label, size = f"parameter {value.source.name}", tuple(shape)
                    varies = self._made_on_guesses(value)
                    for _ in {use.module.index for use in inside if use.module is not None}:
                        self._count_one(
                            mode, "backward", "all-reduce", label, size, value.dtype, members, varies
                        )

    def _partial_parameters(self) -> None:
        """Gradients of replicated parameters that are read in regions: summed together, by their types."""
        for mode, root in self._selection.trace.runs:
            found: dict[torch.dtype, dict[int, Value]] = defaultdict(dict)
            for one in self._summations:
                if one.value.source.kind != "parameter" or not self._flow.reaches(one.value):
                    continue
                uses = [
                    use
                    for use in one.operations
                    if root.first <= use.index < root.last and self._flow.through(use)
                ]
                apart = {
                    use.module.index: use
                    for use in uses
                    if use.module is not None and self._recomputed.is_apart(use)
                }
                for use in apart.values():
                    label, varies = f"parameter {one.value.source.name}", self._on_guesses(use.module)
                    self._count(mode, one.value, "backward", "all-reduce", label, varies)
                if len(apart) < len(uses):
                    found[one.value.dtype][one.value.index] = one.value
            for dtype, values in found.items():
                shape = (sum(prod(value.shape) for value in values.values()),)
                varies = any(map(self._made_on_guesses, values.values()))
                label = "parameters read in regions"
                self._count_one(mode, "backward", "all-reduce", label, shape, dtype, (), varies)

    def _modes(self, summation: Summation) -> list[str]:
        """The runs in which a value's gradient is summed."""
        if not self._flow.reaches(summation.value):
            return []
        flowing = [one for one in summation.operations if self._flow.through(one)]
        return [
            mode
            for mode, root in self._selection.trace.runs
            if any(root.first <= one.index < root.last for one in flowing)
        ]

    def _on_guesses(self, module: ModuleCall | None) -> bool:
        """Whether what the module's code does depends on data that was guessed."""
        while module is not None and module.path not in self._selection.trace.guessed:
            module = module.parent
        return module is not None

    def _made_on_guesses(self, value: Value) -> bool:
        if value.source.kind == "parameter":
            return any(self._on_guesses(use.module) for use in value.uses)
        return value.producer is not None and self._on_guesses(value.producer.module)

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
        for mode, root in self._selection.trace.runs:
            if root.first <= at < root.last:
                self._count(mode, value, direction, kind, label, varies)
                for _ in range(again):
                    self._count(mode, value, "backward", kind, label, varies)

    def _count(
        self, mode: str, value: Value, direction: Direction, kind: str, label: str, varies: bool = False
    ) -> None:
        self._count_one(mode, direction, kind, label, value.shape, value.dtype, (), varies)

    def _count_one(
        self,
        mode: str,
        direction: Direction,
        kind: str,
        label: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        members: tuple[int, ...],
        varies: bool = False,
    ) -> None:
        label = re.sub(r"(?<![^. ])[0-9]+(?![^.])", "*", label)
        self._found[mode, direction, kind, label, shape, prod(shape) * dtype.itemsize, members, varies] += 1

    def _collectives(self) -> tuple[PredictedCollective, ...]:
        return tuple(
            PredictedCollective(mode, direction, kind, label, shape, size, count, members, varies)
            for (mode, direction, kind, label, shape, size, members, varies), count in self._found.items()
        )

    def _sizes(self) -> tuple[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]]:
        cuts = {one.name: one.cut for one in self._selection.chosen}
        ranks = self._selection.ranks
        elements, sizes = [0] * ranks, [0] * ranks
        whole = whole_bytes = 0
        local: dict[tuple[Sharding, int], int] = {}
        for value in self._selection.trace.values:
            if value.source.kind != "parameter":
                continue
            count = prod(value.shape)
            whole += count
            whole_bytes += count * value.dtype.itemsize
            sharding = self._parameters.get(value.source.name)
            for rank in range(ranks):
                mine = count
                if sharding is not None:
                    if (sharding, rank) not in local:
                        local[sharding, rank] = sharding.layout.local_size(cuts[sharding.axis], rank)
                    mine = count // sharding.layout.size * local[sharding, rank]
                elements[rank] += mine
                sizes[rank] += mine * value.dtype.itemsize
        return (whole, tuple(elements)), (whole_bytes, tuple(sizes))
