"""How far a sequence can stay cut: from the partial sums that become parts to whatever needs the whole.

Partial sums leave a region by an all-reduce. Instead each rank can get the sum of its part of the sequence,
and go on with that through whatever treats every token by itself: norms, residuals, dropout, routers. Where
the next region begins, or something needs the whole, the parts are gathered (Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4.2.2).
"""

from __future__ import annotations

from collections import defaultdict

from colrow.plan.sequence.crossings import Crossings
from colrow.plan.sequence.cut import PartStates, SequenceCut
from colrow.plan.sequence.facts import Facts
from colrow.plan.sequence.follow import Parts, follow
from colrow.plan.sequence.noted import AgainError, Noted
from colrow.plan.sequence.numbers import Numbers
from colrow.plan.sequence.partial import PartialGradients
from colrow.trace.records import FunctionCall, Operation

ATTEMPTS = 400
"""A search that has not ended by then is given up."""


class Spread:
    """The search for one sequence.

    Whatever turns out to be impossible is noted, and everything is done again: parts end earlier then, at
    last nothing is cut.

    Args:
        name: as the plan calls the sequence.
        facts: of the sequence.
        others: indices of values that are parts of another one.
    """

    def __init__(self, name: str, facts: Facts, others: set[int]) -> None:
        self._name, self._facts = name, facts
        self._noted = Noted(facts.trace, others)

    def run(self) -> SequenceCut | None:
        """What can be cut; ``None`` if nothing can."""
        # each attempt takes away something that there is less and less of
        for _ in range(ATTEMPTS):
            try:
                found = self._attempt()
            except AgainError:
                continue
            return found if found.scattered else None
        return None

    def _attempt(self) -> SequenceCut:
        facts, noted = self._facts, self._noted
        parts = follow(facts, noted)
        found = SequenceCut(self._name, facts.selection, parts.cut)
        found.scattered = {
            value.index: dimension
            for values in facts.sources
            for value in values
            if value.index in parts.cut and (dimension := found.dimension(value)) is not None
        }
        Crossings(facts, noted, parts, found).run()
        self._check_draws(parts)
        PartialGradients(facts, noted, parts, found).run()
        self._check_numbers(parts, found)
        return found

    def _check_draws(self, parts: Parts) -> None:
        """A module draws random numbers for parts always, or never: ranks draw different ones for parts."""
        draws: dict[str, dict[bool, list[Operation]]] = defaultdict(lambda: {True: [], False: []})
        for operation in self._facts.trace.operations:
            if operation.module is not None and self._facts.draws(operation):
                is_part = any(
                    value.index in parts.cut or self._facts.states.made_local(value)
                    for value in operation.outputs
                )
                draws[operation.module.path][is_part].append(operation)
        mixed = [operation for one in draws.values() if one[False] for operation in one[True]]
        if any(operation.index in parts.operations for operation in mixed):
            self._noted.refuse(mixed)
            raise AgainError

    def _check_numbers(self, parts: Parts, found: SequenceCut) -> None:
        """Calls compute the same on parts, and nobody takes the size of a part for that of the whole."""
        trace, noted = self._facts.trace, self._noted
        numbers = Numbers(trace, PartStates(found.selection, parts.cut, found.crossings), parts.cut)
        on_parts: dict[int, FunctionCall] = {}
        for index in parts.operations:
            call = trace.operations[index].call
            assert call is not None
            on_parts[call.index] = call
        failing = {index for index, call in on_parts.items() if numbers.fails(call)}
        if failing:
            noted.refused |= failing
            raise AgainError
        misused = numbers.misused(call for call in trace.calls if call.index not in on_parts)
        if misused:
            # who takes the size of a whole may have it, if all get the whole
            again = misused & noted.misused
            for index in again - noted.taken:
                noted.refuse(parts.slices.get(index, ()))
            noted.keep_whole(trace.values[index] for index in again)
            noted.ended |= (misused - again) & parts.cut
            noted.misused |= misused
            raise AgainError
