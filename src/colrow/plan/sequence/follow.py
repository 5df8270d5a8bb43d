"""Following a sequence: which values are parts, and who reads what how."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from colrow.plan.sequence.facts import Facts
from colrow.plan.sequence.noted import AgainError, Noted
from colrow.trace.records import Operation, Value


@dataclass
class Parts:
    """What is cut.

    Attributes:
        cut: indices of the values of which each rank has a part.
        operations: indices of the operations that work on parts.
        slices: operations that read parts of what is whole, by the value's index.
        reads: operations that read the whole of what is cut, by the value's index.
    """

    cut: set[int] = field(default_factory=set)
    operations: set[int] = field(default_factory=set)
    slices: dict[int, list[Operation]] = field(default_factory=lambda: defaultdict(list))
    reads: dict[int, list[Operation]] = field(default_factory=lambda: defaultdict(list))


def follow(facts: Facts, noted: Noted) -> Parts:
    """The parts as things are.

    Raises:
        AgainError: if some of it is impossible or no use, which is noted.
    """
    uncut = set(noted.refused)
    # no part of a call can be had alone: if something was taken for cut that is not, once more
    while (found := _Pass(facts, noted, uncut).run()) is None:
        pass
    _check_ends(facts, noted, found)
    return found


class _Pass:
    """From the first operation to the last.

    Args:
        uncut: indices of calls that get the whole; those that turn out to do are added.
    """

    def __init__(self, facts: Facts, noted: Noted, uncut: set[int]) -> None:
        self._facts, self._noted, self._uncut = facts, noted, uncut
        self._found = Parts()

    def run(self) -> Parts | None:
        """The parts; ``None`` if a call was taken for cut that is not."""
        facts, noted, found = self._facts, self._noted, self._found
        calls: set[int] = set()
        sources = {value.index for values in facts.sources for value in values}
        for operation in facts.trace.operations:
            cut = [
                value
                for value in dict.fromkeys(operation.inputs)
                if value.index in found.cut and not facts.is_partial(value, operation)
            ]
            taken = any(value.index in noted.taken for value in operation.inputs)
            if (cut or taken) and self._may_be_cut(operation, cut):
                found.operations.add(operation.index)
                assert operation.call is not None
                calls.add(operation.call.index)
                for value in dict.fromkeys(operation.inputs):
                    if value.index not in found.cut and facts.has(value):
                        found.slices[value.index].append(operation)
                found.cut.update(value.index for value in operation.outputs if facts.has(value))
            else:
                self._check_writes(operation)
                for value in cut:
                    found.reads[value.index].append(operation)
                if cut and operation.call is not None:
                    self._uncut.add(operation.call.index)
            for value in operation.outputs:
                if value.index in sources and value.index not in noted.whole:
                    found.cut.add(value.index)
        return None if calls & self._uncut else found

    def _check_writes(self, operation: Operation) -> None:
        """What is written into by an operation that does not work on parts must be the whole itself.

        A gathered copy would be written into, and nobody would read that.
        """
        values = self._facts.trace.values
        written = {value.storage for value in operation.outputs if value in operation.inputs}
        bad = [values[index] for index in self._found.cut if values[index].storage in written]
        if bad:
            self._noted.keep_whole(bad)
            raise AgainError

    def _may_be_cut(self, operation: Operation, cut: list[Value]) -> bool:
        """Whether the operation may work on parts, those of ``cut`` and slices of all else."""
        facts, noted, call = self._facts, self._noted, operation.call
        if call is None or call.index in self._uncut or facts.is_in_region(operation):
            return False
        if not facts.is_within_range(operation):
            return False
        if any(facts.enters(value, operation) for value in operation.inputs):
            return False
        if any(value.index in noted.ended for value in cut) or not facts.treats_tokens_alike(operation):
            return False
        if any(value.index in noted.whole or not facts.has(value) for value in operation.outputs):
            return False
        # what is whole is sliced: not if it is written into, nor if there is no telling what a rank's part is
        return not any(
            value in operation.outputs or facts.dimension(value) is None
            for value in operation.inputs
            if facts.has(value) and value not in cut
        )


def _check_ends(facts: Facts, noted: Noted, found: Parts) -> None:
    """What leaves a region at one place becomes parts there always, or never; parts can be gathered."""
    bad: list[Value] = []
    useless: list[Value] = []
    for values in facts.sources:
        cut = [value for value in values if value.index in found.cut]
        if cut and (len(cut) < len(values) or any(facts.dimension(value) is None for value in cut)):
            bad += values
        elif cut and not any(use.index in found.operations for value in cut for use in value.uses):
            useless += cut
    for index in {*found.reads, *(facts.outputs & found.cut)}:
        if facts.dimension(facts.trace.values[index]) is None:
            bad.append(facts.trace.values[index])
    # without those that nobody may read as parts, others may be of use
    bad = bad or [value for value in useless if value.index in noted.ended] or useless
    if bad:
        noted.keep_whole(bad)
        raise AgainError
