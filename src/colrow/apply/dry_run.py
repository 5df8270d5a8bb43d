"""Running a cut model on meta tensors, before anything real happens.

One rank's model is made on the meta device and recorded with the same calls as the original was. Its modules
have to give what the plan says: parts of the shapes that were worked out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import Tensor, nn

from colrow.apply.actions import Applier, Passed
from colrow.collectives import Communicator
from colrow.collectives.pending import Pending
from colrow.collectives.statistics import CommStats
from colrow.errors import PlanError
from colrow.localise.arguments import plain_numbers
from colrow.plan import Gather, ModuleOutput, Plan
from colrow.plan.selection import CannotPlaceError
from colrow.plan.sequence.cut import SequenceCut
from colrow.plan.states import States
from colrow.sources import short_path
from colrow.trace import Example, Trace, TraceError, trace_together
from colrow.trace.meta import meta_copy
from colrow.trace.records import ModuleCall, Operation, Value
from colrow.trace.tree import Path as ItemPath


class DryRanks(Communicator):
    """A group of ranks that are not there: collectives give results of the right shapes.

    Args:
        rank: whose part is played.
        size: of the group.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.global_ranks = tuple(range(size))
        self.statistics = CommStats()
        self.sequence = 0
        self._subgroups = {}

    def _begin(
        self,
        operation: str,
        label: str,
        payload: int,
        start: Callable[[], object],
        finish: Callable[[], Tensor],
    ) -> Pending:
        return Pending.completed(finish())

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        """Some of the ranks."""
        members = tuple(ranks)
        return DryRanks(members.index(self.rank), len(members))


def dry_run(
    model: nn.Module,
    examples: Mapping[str, Example],
    plan: Plan,
    states: States,
    rank: int,
    sequences: Sequence[SequenceCut] = (),
) -> str | None:
    """Record the model of ``rank`` and compare its modules' outputs with what ``plan`` says of them.

    Args:
        model: the original; not changed.
        examples: the calls that the plan was made from.
        plan: for ``model``.
        states: of the selection that the plan does.
        rank: whose model is run.
        sequences: what is cut between regions.

    Returns:
        Why it could not be compared, if so.

    Raises:
        CannotPlaceError: if the rank's model raises, or gives other shapes; names the axes of the module.
    """
    run = _Run(model, plan, rank)
    try:
        found = run.record(examples)
    except Exception as error:
        run.direct.refuse(states)
        if isinstance(error, TraceError):
            return f"the dry run was given up: {error}"
        path = getattr(error, "colrow_module", "")
        raise states.selection.cannot(
            f"on rank {rank} {path or 'the model'} raises {type(error).__name__}: {error}",
            *_operations(states.selection.trace, path),
        ) from error
    run.direct.refuse(states)
    for place in run.passed.missing():
        raise states.selection.cannot(
            f"the cut model does not pass {place}", *_operations(states.selection.trace, place.module)
        )
    return _compare(found, states, plan, rank, sequences)


def try_plan(model: nn.Module, examples: Mapping[str, Example], plan: Plan, rank: int) -> None:
    """Record the model of ``rank`` under a plan that somebody has written or edited.

    Args:
        model: the original; not changed.
        examples: calls of it, in all ways in which the plan is to be used.
        plan: for ``model``.
        rank: whose model is run.

    Raises:
        TraceError: if the model cannot be recorded.
        PlanError: if the rank's model raises, does not pass a place at which the plan does something, or
            gives a result of another shape than the original.
    """
    expected = trace_together(model, examples, routing="guess")
    run = _Run(model, plan, rank)
    try:
        found = run.record(examples)
    except TraceError:
        raise
    except Exception as error:
        raise PlanError(
            getattr(error, "colrow_module", ""),
            f"under this plan rank {rank} raises {type(error).__name__}: {error}",
            "Correct the plan, or derive a new one.",
        ) from error
    for place in run.passed.missing():
        raise PlanError(
            place.module,
            f"the plan does something at {place}, which no example passes",
            "Give an example that does, or derive a new plan: the code may have changed since.",
        )
    for (mode, whole), (_, part) in zip(expected.runs, found.runs, strict=True):
        shapes = [[(path, value.shape) for path, value in one.outputs] for one in (whole, part)]
        if shapes[0] != shapes[1]:
            raise PlanError(
                "",
                f"under this plan rank {rank} gives {_texts(shapes[1])} in {mode}, the original "
                f"{_texts(shapes[0])}",
                "Correct the plan, or derive a new one.",
            )


def _texts(shapes: list[tuple[ItemPath, tuple[int, ...]]]) -> str:
    return ", ".join(str(list(shape)) for _, shape in shapes)


class _Run:
    """One rank's model on the meta device, with a plan applied to it."""

    def __init__(self, model: nn.Module, plan: Plan, rank: int) -> None:
        self._model, self._originals = meta_copy(model)
        self.direct, self.passed = _Direct(), Passed()
        before = _own_forwards(self._model)
        ranks = DryRanks(rank, plan.ranks)
        Applier(self._model, ranks, _without_loss(plan), self.passed).apply(gather_logits=True)
        for path, forward in _own_forwards(self._model).items():
            if forward is not before.get(path):
                self.direct.watch(path, self._model.get_submodule(path))

    def record(self, examples: Mapping[str, Example]) -> Trace:
        return trace_together(self._model, examples, routing="guess", originals=self._originals)


def _own_forwards(model: nn.Module) -> dict[str, Callable[..., Any]]:
    return {path: vars(one)["forward"] for path, one in model.named_modules() if "forward" in vars(one)}


class _Direct:
    """Notices code that calls ``module.forward`` itself.

    What a plan does at a module, it does where the module is called, but for a forward of the module's own it
    would be done in such a call as well.
    """

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def watch(self, path: str, module: nn.Module) -> None:
        """Notice direct calls of the module's forward."""
        forward = vars(module)["forward"]

        def watched(*arguments: Any, **keywords: Any) -> Any:
            caller = sys._getframe(1)
            if caller.f_code.co_filename != nn.Module._call_impl.__code__.co_filename:
                self._found[path] = f"{short_path(caller.f_code.co_filename)}:{caller.f_lineno}"
            return forward(*arguments, **keywords)

        watched.__signature__ = signature(forward)  # type: ignore[attr-defined]
        vars(module)["forward"] = watched

    def refuse(self, states: States) -> None:
        """Raise if there was one.

        Raises:
            CannotPlaceError: names the axes of the module.
        """
        for path, place in self._found.items():
            raise states.selection.cannot(
                f"the forward of {path or 'the model'} is called directly in {place}, past the module",
                *_operations(states.selection.trace, path),
            )


def _without_loss(plan: Plan) -> Plan:
    """The plan with logits gathered before the loss: a loss of parts needs real numbers."""
    if plan.loss is None:
        return plan
    sharding = plan.parameters[f"{plan.loss.logits}.weight"]
    logits = replace(sharding, dimension=-1)
    return replace(plan, loss=None, gathers=(*plan.gathers, Gather(ModuleOutput(plan.loss.logits), logits)))


def _operations(trace: Trace, path: str) -> list[Operation]:
    """The operations of a module, or of all if none has that path."""
    found = [one for one in trace.operations if one.module is not None and _inside(one.module, path)]
    return found or trace.operations


def _inside(module: ModuleCall, path: str) -> bool:
    return module.path == path or module.path.startswith(f"{path}.") or not path


def _compare(
    found: Trace, states: States, plan: Plan, rank: int, sequences: Sequence[SequenceCut]
) -> str | None:
    expected = states.selection.trace
    paths = [[call.path for call in trace.modules] for trace in (expected, found)]
    if paths[0] != paths[1]:
        return "the dry run was given up: the cut model calls other modules than the original"
    for call, local in zip(expected.modules, found.modules, strict=True):
        for (_, value), (_, part) in zip(call.outputs, local.outputs, strict=False):
            shape = _shape(value, call, states, rank, sequences)
            if shape is not None and shape != part.shape:
                raise _mismatch(call, shape, part.shape, states, rank)
    _compare_numbers(found, states, plan)
    return None


def _compare_numbers(found: Trace, states: States, plan: Plan) -> None:
    """What the program computes from sizes, in ways that recording does not see, must not have changed.

    Raises:
        CannotPlaceError: if a number other than a size differs.
    """
    changed = {(one.place.module, one.place.call.code, one.place.call.line) for one in plan.integers}
    local = {call.place: call for call in found.calls}
    for call in states.selection.trace.calls:
        other = local.get(call.place)
        code = getattr(call.site.code, "co_qualname", call.site.code.co_name)
        if other is None or (call.module.path, code, call.site.line) in changed:
            continue
        for (path, number), (same, part) in zip(plain_numbers(call), plain_numbers(other), strict=False):
            if path == same and number != part:
                operations = states.selection.trace.operations[call.first : call.last]
                raise states.selection.cannot(
                    f"the program computes with a size that would become local: {number} is {part} on a rank",
                    *operations,
                )


def _mismatch(
    call: ModuleCall, shape: tuple[int, ...], found: tuple[int, ...], states: States, rank: int
) -> CannotPlaceError:
    operations = states.selection.trace.operations[call.first : call.last]
    return states.selection.cannot(
        f"{call.path or 'the model'} would give {list(found)} on rank {rank}, not {list(shape)}", *operations
    )


def _shape(
    value: Value, call: ModuleCall, states: States, rank: int, sequences: Sequence[SequenceCut]
) -> tuple[int, ...] | None:
    """What a module's output should be on a rank; ``None`` if that is not known."""
    if value.index in states.slices:
        return None  # a part may have been taken of it here already
    for sequence in sequences:
        if any(
            one.value is value and any(where.is_result for where in one.places) for one in sequence.crossings
        ):
            return None  # likewise, or it may have been gathered
        if value.index in sequence.cut and call.parent is not None:
            return sequence.selection.local_shape(value, rank)
    if call.parent is None or value.index in states.borders or not states.made_local(value):
        return value.shape
    return states.selection.local_shape(value, rank)
