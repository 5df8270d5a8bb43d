"""Following a sequence through a recorded model: what each rank has its tokens of, and what stays whole.

What comes in with one row for each token is cut at the door. From there on sizes that the program reads are
those of a rank's tokens. Whole values of which a rank needs its tokens, such as positions or labels that were
moved by one, are computed whole and taken where they have come to be one for each token. Whatever mixes
tokens, but attention and losses, is refused with the line.
"""

from __future__ import annotations

from collections import defaultdict

import torch.nn.functional as F
from torch import nn

from colrow.axes import Axes, Registry, infer
from colrow.errors import PlanError
from colrow.localise.arguments import integers_of, values_of
from colrow.parallel.context.checks import Checks
from colrow.parallel.context.comparisons import find_guards
from colrow.parallel.context.doors import Doors
from colrow.parallel.context.found import Found
from colrow.parallel.context.plan import (
    At,
    ContextPlan,
    Extent,
    LastToken,
    LossCall,
    Taken,
    WholeNumber,
)
from colrow.parallel.context.sequences import calls_of, find_sequence
from colrow.parallel.context.steps import LOSSES, argument, inputs_behind, refusal
from colrow.parallel.context.token_axis import selection_of
from colrow.plan.exits import paths_of
from colrow.plan.places import Path
from colrow.plan.sites import Sites
from colrow.trace.integers import TracedInt
from colrow.trace.records import FunctionCall, ModuleCall, Operation, Trace, Value

ATTEMPTS = 64
"""Each keeps more of what is not tokens' features whole."""

_MASK = (
    "Leave padding out (pack sequences, or mark padded labels as ignored), so that the model needs no mask "
    "and says is_causal=True, or do not cut sequences (cp=1)."
)
_NEW = ("aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty")


def plan_context(model: nn.Module, trace: Trace, registry: Registry | None = None) -> ContextPlan:
    """What has to be done to ``model`` for its ranks to have some tokens each.

    Args:
        model: as recorded.
        trace: of all ways in which the model will be called.
        registry: the rules of operators; see :func:`colrow.rule`.

    Raises:
        PlanError: naming the module and the line of what mixes tokens.
    """
    axes = infer(trace, registry)
    whole: set[int] = set()
    first: PlanError | None = None
    for _ in range(ATTEMPTS):
        walk = _Walk(model, trace, axes, whole)
        try:
            return walk.run()
        except _MixedError as mixed:
            first = first or mixed.error
            behind = walk.behind(mixed.values)
            if behind is None or behind <= whole:
                break
            whole |= behind
        except PlanError as error:
            first = first or error
            break
    assert first is not None
    raise first


class _MixedError(Exception):
    """Tokens of one rank are not enough for a step; those of all might be.

    Attributes:
        error: what to say if they are not.
        values: that the step reads.
    """

    def __init__(self, error: PlanError, values: list[Value]) -> None:
        super().__init__(str(error))
        self.error, self.values = error, values


class _Walk:
    """One attempt.

    Args:
        whole: indices of values that stay whole, as what mixes tokens is made of them.
    """

    def __init__(self, model: nn.Module, trace: Trace, axes: Axes, whole: set[int]) -> None:
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
        found: set[int] = set()
        left = [value for value in values if value.index in self._found.cut]
        while left:
            one = left.pop()
            if one.index in found:
                continue
            found.add(one.index)
            made = one.producer
            if made is None:
                continue
            if made.call is not None and made.call.function is F.scaled_dot_product_attention:
                return None
            left += [value for value in made.inputs if value.index in self._found.cut]
        return found

    def _run(self, root: ModuleCall) -> None:
        self._doors.enter(root)
        calls = {call.first: call for call in calls_of(self._found.trace, root) if call.last > call.first}
        attentions = losses = 0
        index = root.first
        while index < root.last:
            step: FunctionCall | Operation = calls.get(index, self._found.trace.operations[index])
            if isinstance(step, Operation):
                self._step(step, (step,))
                index += 1
                continue
            operations = tuple(self._found.trace.operations[step.first : step.last])
            if step.function is F.scaled_dot_product_attention:
                self._attention(step)
                attentions += 1
            elif step.function in LOSSES and self._is_loss_of_tokens(step):
                self._loss(step)
                losses += 1
            else:
                self._step(step, operations)
            index = step.last
        self._found.courses.append((root, (attentions, losses)))
        self._found.plan.outputs.setdefault((attentions, losses), {})

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
        numbers = self._found.local_numbers(step) if isinstance(step, FunctionCall) else {}
        if not cut and not numbers:
            self._whole(step, results)
        elif cut:
            self._on_parts(step, operations, given, results)
        else:
            assert isinstance(step, FunctionCall)
            self._counted(step, operations, given, results, numbers)
        self._checks.writes(step, operations)

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
                raise _MixedError(refusal(reason, step), given)
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
                raise _MixedError(refusal(cause, step), given)
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

    def _attention(self, call: FunctionCall) -> None:
        query, key, value = (argument(call, name) for name in ("query", "key", "value"))
        self._checks.course(call, tuple(self._found.trace.operations[call.first : call.last]))
        for one in (query, key, value):
            extent = self._found.cut.get(one.index)
            if extent != Extent(len(one.shape) - 2):
                raise refusal("attention with queries, keys or values that are not cut", call)
        if argument(call, "attn_mask") is not None:
            raise refusal("attention with a mask", call, _MASK)
        at = self._at(call)
        plan = self._found.plan
        plan.attentions.add(at)
        plan.groups = min(plan.groups, key.shape[-3])
        plan.is_causal &= bool(argument(call, "is_causal"))
        if argument(call, "dropout_p"):
            plan.drops = at
        for result in values_of(call.outputs):
            extent = self._found.axis.extent(result)
            assert extent is not None
            self._found.cut[result.index] = extent

    def _is_loss_of_tokens(self, call: FunctionCall) -> bool:
        given = argument(call, "input")
        return isinstance(given, Value) and self._found.axis.has(given)

    def _loss(self, call: FunctionCall) -> None:
        given, target = argument(call, "input"), argument(call, "target")
        assert isinstance(given, Value)
        if given.index not in self._found.cut:
            raise refusal(f"{call.name} of all tokens", call)
        extent = self._found.cut[given.index]
        classes = 1 if len(given.shape) > 1 else 0
        if extent.dimension == classes:
            raise refusal(f"{call.name} whose classes are tokens", call)
        if argument(call, "reduction") not in ("mean", "sum"):
            operations = tuple(self._found.trace.operations[call.first : call.last])
            return self._step(call, operations)
        if argument(call, "size_average") is not None or argument(call, "reduce") is not None:
            raise refusal("size_average and reduce are deprecated", call, "Use reduction.")
        if not isinstance(target, Value) or target.dtype.is_floating_point:
            raise refusal(f"{call.name} with probabilities for targets", call)
        whole: Extent | None = None
        if target.index not in self._found.cut:
            whole = self._found.axis.extent(target)
            if whole is None or whole.missing != extent.missing:
                raise refusal(
                    f"{call.name} compares the sequence with targets that are not one for each token",
                    call,
                    "Let the loss compare logits of all tokens with labels that were moved by one and "
                    "filled up with ignore_index.",
                )
        self._found.plan.losses.add(LossCall(self._at(call), whole))
        self._found.plan.targets |= inputs_behind(target)
        return None

    def _at(self, call: FunctionCall) -> At:
        at = At(call.module.path, self._sites.name(call))
        self._done[at].add(call.index)
        return at
