"""Which sequences are cut between regions."""

from __future__ import annotations

from collections import Counter

from torch import nn

from colrow.axes.context import ByOperation
from colrow.axes.factor import Factor
from colrow.layout import Cut
from colrow.modules import embedding_fault, is_linear
from colrow.plan.borders import Borders
from colrow.plan.exits import Reductions
from colrow.plan.gradients import Summation
from colrow.plan.selection import Selection
from colrow.plan.sequence.again import keeping_parts
from colrow.plan.sequence.cut import (
    ChosenSequence,
    SequenceCandidate,
    SequenceCut,
    dimension_of,
    parts_of,
)
from colrow.plan.sequence.facts import Facts
from colrow.plan.sequence.spread import Spread
from colrow.plan.sites import Where
from colrow.plan.states import States
from colrow.trace.records import ModuleCall, Value

_ADDS = ("aten.add", "aten.add_")


def find_sequences(
    model: nn.Module,
    states: States,
    borders: Borders,
    reductions: Reductions,
    summations: list[Summation],
) -> list[SequenceCut]:
    """The sequences along which what leaves the regions of a selection can be cut.

    Most models have one; one that encodes and decodes has two.
    """
    found = _Search(model, states, reductions, summations).run()
    logits = None if borders.loss is None else borders.loss.logits
    for one in found:
        one.again = keeping_parts(model, states.selection, one.crossings, logits)
    return found


class _Search:
    def __init__(
        self, model: nn.Module, states: States, reductions: Reductions, summations: list[Summation]
    ) -> None:
        self._model, self._states = model, states
        self._reductions, self._summations = reductions, summations
        self._axes = states.selection.axes
        self._leaving = [one.value for one in reductions.all]
        self._weights = self._features()

    def run(self) -> list[SequenceCut]:
        found: list[SequenceCut] = []
        done: set[int] = set()
        for sequences in self._candidates():
            name = "sequence" if not found else f"sequence_{len(found) + 1}"
            selection = self._selection(name, sequences)
            left = [value for value in self._leaving if value.index not in done]
            if all(dimension_of(selection, value) is None for value in left):
                continue
            facts = Facts(
                self._states,
                self._reductions,
                self._summations,
                selection,
                self._biases(),
                self._tables(),
            )
            one = Spread(name, facts, done).run()
            if one is not None:
                found.append(one)
                done |= one.cut
        return found

    def _candidates(self) -> list[list[tuple[Factor, ...]]]:
        """What could be a sequence, the best first: what attention mixes, then what is longest.

        Each run of a trace has one of its own: those that stand at the same place belong together.
        """
        often: Counter[tuple[Factor, ...]] = Counter()
        together: dict[tuple[Factor, ...], list[tuple[Factor, ...]]] = {}
        places: dict[tuple[object, ...], tuple[Factor, ...]] = {}
        for one in self._reductions.all:
            place = Where(one.module, one.path, True, one.call).key
            for dimension, factor in enumerate(self._axes.dimensions(one.value)):
                parts = self._sequence(factor)
                if parts is None:
                    continue
                often[parts] += 1
                mine = together.setdefault(parts, [parts])
                other = together[places.setdefault((*place, dimension), parts)]
                if other is not mine:
                    other += mine
                    together.update((each, other) for each in mine)
        groups = list({id(group): group for group in together.values()}.values())
        marks = self._axes.marks
        batch = {
            atom.index
            for value in self._axes.trace.values
            if value.source.kind == "input" and value.shape
            for atom in self._axes.atoms_of(self._axes.dimensions(value)[0])
        }
        summed, whole = self._marked(marks.contracted), self._marked(marks.blocked) - batch

        def order(group: list[tuple[Factor, ...]]) -> tuple[int, int, int]:
            return (
                -sum(often[parts] for parts in group),
                -max(sum(part.size for part in parts) for parts in group),
                min(atom.index for parts in group for atom in parts),
            )

        # attention sums over the sequence, a scan needs it whole; what is only first in all inputs is a batch
        for wanted in (summed, whole):
            mixed = [group for group in groups if any(atom.index in wanted for one in group for atom in one)]
            if mixed:
                return sorted(mixed, key=order)
        return []

    def _sequence(self, factor: Factor) -> tuple[Factor, ...] | None:
        """The atoms of a dimension that could be a sequence: as long as there are ranks, no features."""
        if factor.size < max(2, self._states.selection.ranks):
            return None
        parts = parts_of(self._axes, factor)
        return None if parts is None or any(part.index in self._weights for part in parts) else parts

    def _features(self) -> set[int]:
        """Atoms of weights.

        A parameter that is only added to something, as learned positions are, may have a row for each token.
        """
        return {
            atom.index
            for value in self._axes.trace.values
            if value.source.kind == "parameter" and not all(use.name in _ADDS for use in value.uses)
            for atom in self._axes.atoms(value)
        }

    def _marked(self, mark: ByOperation) -> set[int]:
        """Atoms that operations on parts of other axes marked so."""
        found: set[int] = set()
        for operation in self._axes.trace.operations:
            if any(self._states.is_local(value) for value in operation.inputs):
                found.update(atom.index for atom in self._axes.marked(mark, operation))
        return found

    def _selection(self, name: str, sequences: list[tuple[Factor, ...]]) -> Selection:
        chosen = []
        for parts in sequences:
            candidate = SequenceCandidate(parts, name)
            chosen.append(
                ChosenSequence(name, candidate, Cut.balanced(candidate.units, self._states.selection.ranks))
            )
        return Selection(self._axes, chosen)

    def _biases(self) -> dict[int, tuple[Value, ModuleCall]]:
        """Biases that a linear layer adds after the reduction, by the value that leaves the region there."""
        given = {
            (one.module.path, one.module.index): one.value for one in self._reductions.all if one.call is None
        }
        found: dict[int, tuple[Value, ModuleCall]] = {}
        for parameter, module in self._reductions.once:
            value = given.get((module.path, module.index))
            if value is not None and is_linear(self._model.get_submodule(module.path)):
                found[value.index] = (parameter, module)
        return found

    def _tables(self) -> set[str]:
        """Paths of the modules that look up in one way, whatever calls them."""
        return {path for path, module in self._model.named_modules() if embedding_fault(module) is None}
