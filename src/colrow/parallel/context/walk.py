"""Following a sequence through a recorded model: what each rank has its tokens of, and what stays whole.

What comes in with one row for each token is cut at the door. From there on sizes that the program reads are
those of a rank's tokens. Whole values of which a rank needs its tokens, such as positions or labels that were
moved by one, are computed whole and taken where they have come to be one for each token. Whatever mixes
tokens, but attention and losses, is given those of all ranks, or refused with the line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from colrow.axes import Axes, Registry, infer
from colrow.errors import PlanError
from colrow.localise.arguments import integers_of, values_of
from colrow.parallel.context.checks import Checks
from colrow.parallel.context.comparisons import find_guards
from colrow.parallel.context.doors import Doors
from colrow.parallel.context.found import Found
from colrow.parallel.context.gathering import gathering_calls, refuse_chance
from colrow.parallel.context.meeting import is_sum_over_tokens, note_attention, note_loss
from colrow.parallel.context.plan import (
    At,
    ContextPlan,
    Extent,
    Gathered,
    LastToken,
    Taken,
    WholeNumber,
)
from colrow.parallel.context.sequences import calls_of, find_sequence
from colrow.parallel.context.steps import LOSSES, REMEDY, refusal
from colrow.parallel.context.token_axis import selection_of
from colrow.parallel.experts.find import experts_of
from colrow.plan.exits import paths_of
from colrow.plan.places import Path
from colrow.plan.sites import Sites
from colrow.trace.integers import TracedInt
from colrow.trace.records import FunctionCall, ModuleCall, Operation, Trace, Value

ATTEMPTS = 64
"""Each keeps more of what is not tokens' features whole."""

_NEW = ("aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty")


def plan_context(model: nn.Module, trace: Trace, registry: Registry | None = None) -> ContextPlan:
    """What has to be done to ``model`` for its ranks to have some tokens each.

    Args:
        model: as recorded.
        trace: of all ways in which the model will be called.
        registry: the rules of operators; see :func:`colrow.rule`.

    Raises:
        PlanError: naming the module and the line of what mixes tokens; its cause why that is not helped by
            gathering them.
    """
    axes = infer(trace, registry)
    experts = _paths_of_experts(model, trace)
    whole: set[int] = set()
    gathering: set[int] = set()
    first: PlanError | None = None
    last: PlanError | None = None
    instead: _Instead | None = None
    for _ in range(ATTEMPTS):
        walk = _Walk(model, trace, axes, experts, whole, gathering)
        try:
            return walk.run()
        except _MixedError as mixed:
            first = first or mixed.error
            behind, further = walk.behind(mixed.values), walk.gathering_for(mixed.step)
            if behind is not None and not behind <= whole:
                instead = instead or _Instead(set(whole), further)
                whole |= behind
                continue
            if not further <= gathering:
                gathering |= further
                continue
        except PlanError as error:
            first, last = first or error, error if first else None
        # keeping whole what the step is made of has led nowhere: gather it for the step
        if instead is None or instead.gathering <= gathering:
            break
        whole, gathering, instead = instead.whole, gathering | instead.gathering, None
    assert first is not None
    raise first from last


@dataclass(frozen=True)
class _Instead:
    """What to try where it does not help that values stay whole.

    Attributes:
        whole: those that stayed so before.
        gathering: calls that are to be given the tokens of all ranks.
    """

    whole: set[int]
    gathering: set[int]


def _paths_of_experts(model: nn.Module, trace: Trace) -> Set[str]:
    """Modules that have been tried: what they make of a token depends on it and its choices alone."""
    try:
        return experts_of(model, trace).keys()
    except PlanError:  # then the lines of its program say what it does
        return frozenset()


class _MixedError(Exception):
    """Tokens of one rank are not enough for a step; those of all might be.

    Attributes:
        error: what to say if they are not.
        step: that mixes tokens.
        values: that it reads.
    """

    def __init__(self, reason: str, step: FunctionCall | Operation, values: list[Value]) -> None:
        self.error, self.step, self.values = refusal(reason, step), step, values
        super().__init__(str(self.error))


class _Walk:
    """One attempt.

    Args:
        experts: paths of modules that treat every token by itself.
        whole: indices of values that stay whole, as what mixes tokens is made of them.
        gathering: indices of the calls that are given the tokens of all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        axes: Axes,
        experts: Set[str],
        whole: set[int],
        gathering: Set[int],
    ) -> None:
        self._experts, self._gathering = experts, gathering
        self._found = Found(axes, whole)
        self._doors, self._checks = Doors(model, self._found), Checks(self._found, trace)
        # all passes of one place are changed alike: for each place, what is done in each
        self._done: dict[At, set[int]] = defaultdict(set)

    def run(self) -> ContextPlan:
        roots = [root for _, root in self._found.trace.runs]
        sequences = [find_sequence(self._found.axes, root) for root in roots]
        selection = selection_of(self._found.axes, sequences)
        self._sites = Sites(selection)
        for root, axis in zip(roots, sequences, strict=True):
            self._found.axis = axis
            self._run(root)
        self._doors.leave()
        self._checks.passes(self._done, self._sites)
        self._checks.numbers(selection)
        local = self._found.dimensions
        self._found.plan.guards = find_guards(self._found.trace, sequences, local)
        return self._found.plan

    def behind(self, values: list[Value]) -> set[int] | None:
        """Indices of the cut values that these are made of; ``None`` if attention makes some of them."""
        seen: set[int] = set()
        left = [value for value in values if value.index in self._found.cut]
        while left:
            one = left.pop()
            if one.index in seen:
                continue
            seen.add(one.index)
            made = one.producer
            if made is None:
                continue
            if made.call is not None and made.call.function is F.scaled_dot_product_attention:
                return None
            # what calls make on the way is not noted as cut
            left += [value for value in made.inputs if self._found.axis.has(value)]
        return seen & self._found.cut.keys()

    def gathering_for(self, step: FunctionCall | Operation) -> set[int]:
        """Indices of the calls to be given all tokens, for a step to have them; none if it is no call."""
        if not isinstance(step, FunctionCall):
            return set()
        return gathering_calls(
            self._found.axes, step, self._gathering, self._sites.alike, self._found.axis.has
        )

    def _run(self, root: ModuleCall) -> None:
        self._doors.enter(root)
        calls = {call.first: call for call in calls_of(self._found.trace, root) if call.last > call.first}
        experts = {
            call.first: call
            for call in self._found.trace.modules
            if call.path in self._experts and root.first <= call.first < call.last <= root.last
        }
        attentions = losses = 0
        index = root.first
        while index < root.last:
            if index in experts:
                self._through_experts(experts[index])
                index = experts[index].last
                continue
            step: FunctionCall | Operation = calls.get(index, self._found.trace.operations[index])
            if isinstance(step, Operation):
                self._step(step, (step,))
                index += 1
                continue
            operations = tuple(self._found.trace.operations[step.first : step.last])
            if step.function is F.scaled_dot_product_attention:
                self._checks.course(step, operations)
                note_attention(self._found, step, self._at(step))
                attentions += 1
            elif step.function in LOSSES and is_sum_over_tokens(self._found, step):
                note_loss(self._found, step, self._at(step))
                losses += 1
            else:
                self._step(step, operations)
            index = step.last
        self._found.courses.append((root, (attentions, losses)))
        self._found.plan.outputs.setdefault((attentions, losses), {})

    def _through_experts(self, call: ModuleCall) -> None:
        """Of a rank's tokens, their choices and what these count come its tokens."""
        extents = [self._found.cut.get(value.index) for _, value in call.inputs]
        if all(extent is None for extent in extents):
            if any(value.index in self._found.of_all for _, value in call.inputs):
                self._found.of_all.update(value.index for _, value in call.outputs)
            return
        if any(extent != Extent(0) for extent in extents):
            raise PlanError(call.path, "experts are given a rank's tokens and choices of others", REMEDY)
        for _, value in call.outputs:
            if self._found.axis.extent(value) != Extent(0):
                raise PlanError(
                    call.path, "it is not known where the tokens lie in what experts return", REMEDY
                )
            self._found.cut[value.index] = Extent(0)

    def _step(self, step: FunctionCall | Operation, operations: tuple[Operation, ...]) -> None:
        """A call, or an operator outside of calls, that is neither attention nor a loss."""
        given = values_of((step.arguments, step.keywords))
        results = [one for one in values_of(step.outputs) if not any(one is other for other in given)]
        cut = [value for value in given if value.index in self._found.cut]
        if any(value.index in self._found.constants for value in given):
            if cut or any(self._found.axis.has(value) for value in results):
                raise refusal(f"{step.name} of tokens and an argument that is the same for each", step)
            self._found.constants.update(value.index for value in results)
            return
        if isinstance(step, FunctionCall) and step.index in self._gathering:
            return self._on_all(step, operations, cut, results)
        numbers = self._found.local_numbers(step) if isinstance(step, FunctionCall) else {}
        if any(value.index in self._found.of_all for value in given):
            if cut or numbers:
                reason = f"{step.name} of a rank's tokens and of what is made of all"
                if any(self._found.axis.has(one) for one in results):
                    raise refusal(reason, step)
                raise _MixedError(reason, step, given)
            refuse_chance(step, operations)
            self._note_of_all(operations, results)
        elif not cut and not numbers:
            self._whole(step, results)
        elif cut:
            self._on_parts(step, operations, given, results)
        else:
            assert isinstance(step, FunctionCall)
            self._counted(step, operations, given, results, numbers)
        self._checks.writes(step, operations)
        return None

    def _on_all(
        self,
        call: FunctionCall,
        operations: tuple[Operation, ...],
        cut: list[Value],
        results: list[Value],
    ) -> None:
        """A call that mixes tokens is given those of all ranks."""
        self._checks.course(call, operations)
        refuse_chance(call, operations)
        if self._found.local_numbers(call):
            raise refusal(f"{call.name} of all tokens is given the number of a rank's", call)
        for value in dict.fromkeys(cut):
            extent = self._found.cut[value.index]
            if extent.missing:
                raise refusal(f"{call.name} mixes what lacks the last token", call)
            at = self._at(call)
            paths = [path[1:] for path, one in paths_of((call.arguments, call.keywords)) if one is value]
            self._found.plan.gathered.update(Gathered(at, path, extent) for path in paths)
        self._note_of_all(operations, results)

    def _note_of_all(self, operations: tuple[Operation, ...], results: list[Value]) -> None:
        """What is made of all ranks' tokens, and whatever has the memory that it is written into."""
        self._found.of_all.update(value.index for value in results)
        self._found.of_all.update(self._checks.written_by(operations))

    def _whole(self, step: FunctionCall | Operation, results: list[Value]) -> None:
        """All is whole: a rank takes its tokens of what has one row for each by now."""
        for value in results:
            extent = self._found.extent_of_all(value)
            if extent is not None and isinstance(step, FunctionCall):
                self._take_result(step, value, extent)

    def _take_result(self, call: FunctionCall, value: Value, extent: Extent) -> None:
        if value.index in self._found.kept:
            return
        at = self._at(call)
        paths = [path for path, one in paths_of(call.outputs) if one is value]
        self._found.plan.taken.update(Taken(at, path, extent, True) for path in paths)
        self._found.cut[value.index] = extent

    def _on_parts(
        self,
        step: FunctionCall | Operation,
        operations: tuple[Operation, ...],
        given: list[Value],
        results: list[Value],
    ) -> None:
        self._checks.course(step, operations)
        if isinstance(step, FunctionCall) and any(
            isinstance(number, TracedInt) and self._found.is_of_constants(number)
            for number in integers_of(step).values()
        ):
            raise refusal(f"{step.name} of tokens and a size of what is the same for each", step)
        for operation in operations:
            reason = self._found.axis.mixed_by(operation)
            if reason is not None:
                raise _MixedError(reason, step, given)
        for value in dict.fromkeys(given):
            if value.index in self._found.cut or not self._found.axis.has(value):
                continue
            extent = self._found.extent_of_all(value)
            if extent is None or not isinstance(step, FunctionCall):
                raise refusal(f"{step.name} of a rank's tokens and of all", step)
            at = self._at(step)
            paths = [path[1:] for path, one in paths_of((step.arguments, step.keywords)) if one is value]
            self._found.plan.taken.update(Taken(at, path, extent, False) for path in paths)
            self._found.arguments[value.index].append((value, step))
        missing = {self._found.cut[value.index].missing for value in given if value.index in self._found.cut}
        for value in results:
            extent = self._found.axis.extent(value)
            if extent is not None and extent.missing not in missing and isinstance(step, FunctionCall):
                self._leave_out_last(step)
                self._found.cut[value.index] = extent
                return
            if extent is None and all(operation.name in _NEW for operation in operations):
                continue
            if extent is None:
                cause = f"{step.name} makes one of several tokens, or takes some out"
                raise _MixedError(cause, step, given)
            self._found.cut[value.index] = extent
        if isinstance(step, FunctionCall) and integers_of(step):
            self._found.to_try.append(step)

    def _leave_out_last(self, call: FunctionCall) -> None:
        """A rank leaves out no token, as it cannot tell whether it has the last: the loss ignores it."""
        last = self._found.axis.length - 1
        paths = [
            path
            for path, number in integers_of(call).items()
            if path[-1] == "stop"
            and (int(number) == -1 or (int(number) == last and path in self._found.local_numbers(call)))
        ]
        if len(paths) != 1 or call.name != "__getitem__":
            raise refusal(f"{call.name} takes tokens out", call)
        self._found.plan.last_tokens.add(LastToken(self._at(call), paths[0]))

    def _counted(
        self,
        call: FunctionCall,
        operations: tuple[Operation, ...],
        given: list[Value],
        results: list[Value],
        numbers: dict[Path, TracedInt],
    ) -> None:
        """What is whole meets the number of a rank's tokens."""
        extents = [self._found.extent_of_all(value) for value in results]
        if not results or any(extent is None for extent in extents):
            raise refusal(f"{call.name} is given the number of tokens, and gives no row for each", call)
        is_plain = not any(self._found.axis.has(one) for one in given) and not any(
            one.index in self._found.kept for one in results
        )
        if is_plain and all(self._found.axis.mixed_by(operation) is None for operation in operations):
            # zeros and the like: as many as the rank has tokens
            for value, extent in zip(results, extents, strict=True):
                assert extent is not None
                self._found.cut[value.index] = extent
            self._found.to_try.append(call)
            return
        at = self._at(call)
        for path, number in numbers.items():
            if not self._found.counts_tokens(number):
                raise refusal(f"{call.name} is given a number that is not that of tokens", call)
            self._found.plan.numbers.add(WholeNumber(at, path))
        for value, extent in zip(results, extents, strict=True):
            assert extent is not None
            self._take_result(call, value, extent)

    def _at(self, call: FunctionCall) -> At:
        at = At(call.module.path, self._sites.name(call))
        self._done[at].add(call.index)
        return at
