"""Following a sequence through a recorded model: what each rank has its tokens of, and what stays whole.

What comes in with one row for each token is cut at the door. From there on sizes that the program reads are
those of a rank's tokens. Whole values of which a rank needs its tokens, such as positions or labels that were
moved by one, are computed whole and taken where they have come to be one for each token. Whatever mixes
tokens, but attention and losses, is refused with the line.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import nn

from colrow.axes import Axes, Registry, infer
from colrow.errors import PlanError
from colrow.localise.arguments import integers_of, values_of
from colrow.parallel.context.comparisons import find_guards, number_at, sizes_in
from colrow.parallel.context.names import positional_names
from colrow.parallel.context.plan import (
    At,
    ContextPlan,
    Extent,
    LossCall,
    Taken,
    WholeNumber,
)
from colrow.parallel.context.token_axis import TokenAxis, selection_of
from colrow.plan.exits import paths_of
from colrow.plan.places import Path
from colrow.plan.selection import Selection
from colrow.plan.sequence.cut import Crossing, PartStates, parts_of
from colrow.plan.sequence.numbers import Numbers
from colrow.plan.sites import Sites, Where
from colrow.sources import short_path
from colrow.trace.integers import Size, TracedInt, origins
from colrow.trace.records import FunctionCall, ModuleCall, Operation, Trace, Value

LOSSES = (F.cross_entropy, F.nll_loss)

_REMEDY = (
    "With sequences cut over ranks (cp), the model may treat tokens one by one and through "
    "F.scaled_dot_product_attention without a mask, causal or not."
)
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
    return _Walk(model, trace, infer(trace, registry)).run()


class _Walk:
    def __init__(self, model: nn.Module, trace: Trace, axes: Axes) -> None:
        self._trace, self._axes = trace, axes
        self._names = positional_names(model.forward)
        self._plan = ContextPlan()
        self._cut: dict[int, Extent] = {}
        self._arguments: dict[int, list[tuple[Value, FunctionCall]]] = defaultdict(list)
        self._to_try: list[FunctionCall] = []
        self._courses: list[tuple[ModuleCall, tuple[int, int]]] = []
        self._axis = TokenAxis(axes, ())
        self._storages: dict[int, list[Value]] = defaultdict(list)
        for value in trace.values:
            self._storages[value.storage].append(value)
        self._written = {
            index: one
            for one in trace.written
            if one.kind != "parameter hook"
            for index in range(one.first, max(one.last, one.first + 1))
        }
        # all passes of one place are changed alike: for each place, what is done in each
        self._done: dict[At, set[int]] = defaultdict(set)

    def run(self) -> ContextPlan:
        roots = [root for _, root in self._trace.runs]
        sequences = [self._sequence(root) for root in roots]
        selection = selection_of(self._axes, sequences)
        self._sites = Sites(selection)
        for root, axis in zip(roots, sequences, strict=True):
            self._axis = axis
            self._run(root)
        self._close_door()
        self._check_passes()
        self._check_numbers(selection)
        local = {index: extent.dimension for index, extent in self._cut.items()}
        self._plan.guards = find_guards(self._trace, sequences, local)
        return self._plan

    # ---------------------------------------------------------------- what is the sequence

    def _sequence(self, root: ModuleCall) -> TokenAxis:
        """What attention of a run goes over."""
        found: TokenAxis | None = None
        for call in self._calls(root):
            if call.function is not F.scaled_dot_product_attention:
                continue
            query, key = (_argument(call, name) for name in ("query", "key"))
            assert isinstance(query, Value)
            assert isinstance(key, Value)
            queries, keys = (parts_of(self._axes, self._axes.dimensions(one)[-2]) for one in (query, key))
            if queries is None or queries != keys:
                raise self._refused("attention between two sequences", call)
            if found is not None and found.parts != queries:
                raise self._refused("attention over another sequence than before", call)
            found = TokenAxis(self._axes, queries)
        if found is None:
            raise PlanError(
                root.path,
                "it does not call F.scaled_dot_product_attention, so that its sequences cannot be cut over "
                "ranks (cp)",
                "Write its attention with F.scaled_dot_product_attention(..., is_causal=True); models of "
                "transformers do if they are made with attn_implementation='sdpa'.",
            )
        if found.length < 2 or not found.atoms:
            raise PlanError(
                root.path, "the example's sequence is too short", "Give an example of at least 4 tokens."
            )
        return found

    def _calls(self, root: ModuleCall) -> Iterator[FunctionCall]:
        return (call for call in self._trace.calls if root.first <= call.first < root.last)

    # ---------------------------------------------------------------- the walk

    def _run(self, root: ModuleCall) -> None:
        self._open_door(root)
        calls = {call.first: call for call in self._calls(root) if call.last > call.first}
        attentions = losses = 0
        index = root.first
        while index < root.last:
            step: FunctionCall | Operation = calls.get(index, self._trace.operations[index])
            if isinstance(step, Operation):
                self._step(step, (step,))
                index += 1
                continue
            operations = tuple(self._trace.operations[step.first : step.last])
            if step.function is F.scaled_dot_product_attention:
                self._attention(step)
                attentions += 1
            elif step.function in LOSSES and self._is_loss_of_tokens(step):
                self._loss(step)
                losses += 1
            else:
                self._step(step, operations)
            index = step.last
        self._courses.append((root, (attentions, losses)))
        self._plan.outputs.setdefault((attentions, losses), {})

    def _close_door(self) -> None:
        """What leaves the model."""
        for path, value in self._trace.outputs:
            extent, made = self._cut.get(value.index), value.producer
            if extent is None:
                continue
            course = next(
                course
                for root, course in self._courses
                if any(value is one for _, one in root.inputs)
                or (made is not None and root.first <= made.index < root.last)
            )
            if self._plan.outputs[course].setdefault(path, extent) != extent:
                raise PlanError(
                    "",
                    f"its result {'.'.join(map(str, path))} has its tokens elsewhere in another call",
                    "Give examples whose results have one form.",
                )
        for kept in self._trace.kept:
            if kept.value.index in self._cut:
                raise PlanError(
                    "",
                    f"it leaves tokens in {kept.label}, where others would find those of one rank only",
                    "Do not keep them there.",
                )

    def _open_door(self, root: ModuleCall) -> None:
        for path, value in root.inputs:
            extent = self._axis.extent(value)
            if path and isinstance(path[0], int) and path[0] < len(self._names):
                path = (self._names[path[0]], *path[1:])
            if extent is None or value.source.kind != "input":
                self._plan.whole_inputs.add(path)
                continue
            if extent.inner != 1:
                raise PlanError(
                    root.path,
                    f"its input {'.'.join(map(str, path))} has tokens and something else in one dimension",
                    "Give it a dimension of its own for the sequence.",
                )
            self._plan.inputs[path] = extent.dimension
            self._cut[value.index] = extent

    def _step(self, step: FunctionCall | Operation, operations: tuple[Operation, ...]) -> None:
        """A call, or an operator outside of calls, that is neither attention nor a loss."""
        given = values_of((step.arguments, step.keywords))
        results = [one for one in values_of(step.outputs) if not any(one is other for other in given)]
        cut = [value for value in given if value.index in self._cut]
        numbers = self._local_numbers(step) if isinstance(step, FunctionCall) else {}
        if not cut and not numbers:
            self._whole(step, results)
        elif cut:
            self._on_parts(step, operations, given, results)
        else:
            assert isinstance(step, FunctionCall)
            self._counted(step, operations, given, results, numbers)
        self._check_writes(step, operations)

    def _whole(self, step: FunctionCall | Operation, results: list[Value]) -> None:
        """All is whole: a rank takes its tokens of what has one row for each by now."""
        for value in results:
            extent = self._axis.extent(value)
            if extent is not None and isinstance(step, FunctionCall):
                self._take_result(step, value, extent)

    def _take_result(self, call: FunctionCall, value: Value, extent: Extent) -> None:
        at = self._at(call)
        paths = [path for path, one in paths_of(call.outputs) if one is value]
        self._plan.taken.update(Taken(at, path, extent, True) for path in paths)
        self._cut[value.index] = extent

    def _on_parts(
        self,
        step: FunctionCall | Operation,
        operations: tuple[Operation, ...],
        given: list[Value],
        results: list[Value],
    ) -> None:
        self._check_course(step, operations)
        for operation in operations:
            reason = self._axis.mixed_by(operation)
            if reason is not None:
                raise self._refused(reason, step)
        for value in dict.fromkeys(given):
            if value.index in self._cut or not self._axis.has(value):
                continue
            extent = self._axis.extent(value)
            if extent is None or not isinstance(step, FunctionCall):
                raise self._refused(f"{_name(step)} of a rank's tokens and of all", step)
            at = self._at(step)
            paths = [path[1:] for path, one in paths_of((step.arguments, step.keywords)) if one is value]
            self._plan.taken.update(Taken(at, path, extent, False) for path in paths)
            self._arguments[value.index].append((value, step))
        for value in results:
            extent = self._axis.extent(value)
            if extent is None and all(operation.name in _NEW for operation in operations):
                continue
            if extent is None:
                raise self._refused(f"{_name(step)} makes one of several tokens, or takes some out", step)
            self._cut[value.index] = extent
        if isinstance(step, FunctionCall) and integers_of(step):
            self._to_try.append(step)

    def _counted(
        self,
        call: FunctionCall,
        operations: tuple[Operation, ...],
        given: list[Value],
        results: list[Value],
        numbers: dict[Path, TracedInt],
    ) -> None:
        """What is whole meets the number of a rank's tokens."""
        extents = [self._axis.extent(value) for value in results]
        if not results or any(extent is None for extent in extents):
            raise self._refused(f"{call.name} is given the number of tokens, and gives no row for each", call)
        is_plain = not any(self._axis.has(value) for value in given)
        if is_plain and all(self._axis.mixed_by(operation) is None for operation in operations):
            # zeros and the like: as many as the rank has tokens
            for value, extent in zip(results, extents, strict=True):
                assert extent is not None
                self._cut[value.index] = extent
            self._to_try.append(call)
            return
        at = self._at(call)
        for path, number in numbers.items():
            if not self._counts_tokens(number):
                raise self._refused(f"{call.name} is given a number that is not that of tokens", call)
            self._plan.numbers.add(WholeNumber(at, path))
        for value, extent in zip(results, extents, strict=True):
            assert extent is not None
            self._take_result(call, value, extent)

    # ---------------------------------------------------------------- attention and losses

    def _attention(self, call: FunctionCall) -> None:
        query, key, value = (_argument(call, name) for name in ("query", "key", "value"))
        self._check_course(call, tuple(self._trace.operations[call.first : call.last]))
        for one in (query, key, value):
            extent = self._cut.get(one.index)
            if extent is None or extent.dimension != len(one.shape) - 2 or extent.inner != 1:
                raise self._refused("attention with queries, keys or values that are not cut", call)
        if _argument(call, "attn_mask") is not None:
            raise self._refused("attention with a mask", call, _MASK)
        at = self._at(call)
        plan = self._plan
        plan.attentions.add(at)
        plan.groups = min(plan.groups, key.shape[-3])
        plan.is_causal &= bool(_argument(call, "is_causal"))
        if _argument(call, "dropout_p"):
            plan.drops = at
        for result in values_of(call.outputs):
            extent = self._axis.extent(result)
            assert extent is not None
            self._cut[result.index] = extent

    def _is_loss_of_tokens(self, call: FunctionCall) -> bool:
        given = _argument(call, "input")
        return isinstance(given, Value) and self._axis.has(given)

    def _loss(self, call: FunctionCall) -> None:
        given, target = _argument(call, "input"), _argument(call, "target")
        assert isinstance(given, Value)
        if given.index not in self._cut:
            raise self._refused(f"{call.name} of all tokens", call)
        extent = self._cut[given.index]
        classes = 1 if len(given.shape) > 1 else 0
        if extent.dimension == classes:
            raise self._refused(f"{call.name} whose classes are tokens", call)
        if _argument(call, "reduction") not in ("mean", "sum"):
            operations = tuple(self._trace.operations[call.first : call.last])
            return self._step(call, operations)
        if _argument(call, "size_average") is not None or _argument(call, "reduce") is not None:
            raise self._refused("size_average and reduce are deprecated", call, "Use reduction.")
        if not isinstance(target, Value) or target.dtype.is_floating_point:
            raise self._refused(f"{call.name} with probabilities for targets", call)
        whole: Extent | None = None
        if target.index not in self._cut:
            whole = self._axis.extent(target)
            if whole is None:
                raise self._refused(
                    f"{call.name} compares the sequence with targets that are not one for each token",
                    call,
                    "Let the loss compare logits of all tokens with labels that were moved by one and "
                    "filled up with ignore_index.",
                )
        self._plan.losses.add(LossCall(self._at(call), whole))
        self._plan.targets |= _inputs_behind(target)
        return None

    # ---------------------------------------------------------------- numbers

    def _local_numbers(self, call: FunctionCall) -> dict[Path, TracedInt]:
        """The integers among a call's arguments that depend on how many tokens a rank has."""
        return {
            path: number
            for path, number in integers_of(call).items()
            if isinstance(number, TracedInt) and self._is_local(number)
        }

    def _is_local(self, number: TracedInt) -> bool:
        return any(
            isinstance(origin, Size)
            and origin.value_index in self._cut
            and self._cut[origin.value_index].dimension == origin.dimension
            for origin in origins(number.expression)
        )

    def _counts_tokens(self, number: TracedInt) -> bool:
        """Whether one token more makes a number one more."""
        local = {index: extent.dimension for index, extent in self._cut.items()}
        sizes = sizes_in(number.expression, self._trace, self._axis, local)
        length = self._axis.length
        first = number_at(number.expression, sizes, 100, length)
        return first is not None and all(
            number_at(number.expression, sizes, tokens, length) == first + tokens - 100
            for tokens in (101, 107, 1000)
        )

    def _check_numbers(self, selection: Selection) -> None:
        """Calls with numbers give the parts of their results on parts; no number is used for another."""
        crossings = [
            Crossing(
                value,
                tuple(self._trace.operations[call.first] for _, call in uses),
                "slice",
                0,
                tuple(Where(call.module, (), False, call) for _, call in uses),
            )
            for uses in self._arguments.values()
            for value in [uses[0][0]]
        ]
        states = PartStates(selection, self._cut.keys(), crossings)
        numbers = Numbers(self._trace, states, self._cut.keys())
        for call in self._to_try:
            if numbers.fails(call):
                raise self._refused(
                    f"{call.name} with these numbers does not treat every token by itself", call
                )

    # ---------------------------------------------------------------- checks

    def _check_course(self, step: FunctionCall | Operation, operations: tuple[Operation, ...]) -> None:
        module = step.module
        if module is not None and module.path in self._trace.guessed:
            raise self._refused("what is done with tokens depends on their numbers, or on chance", step)
        for operation in operations:
            written = self._written.get(operation.index)
            if written is not None and (written.finding is None or not written.finding.is_derivative):
                raise self._refused(f"the backward of {written.name} may mix tokens", step)

    def _check_writes(self, step: FunctionCall | Operation, operations: tuple[Operation, ...]) -> None:
        """What is written into is cut as what is written, and so is all that shares its memory."""
        for operation in operations:
            written = [one for one in operation.outputs if any(one is other for other in operation.inputs)]
            if not written or not any(one.index in self._cut for one in operation.inputs):
                continue
            for value in written:
                bad = [
                    one
                    for one in self._storages[value.storage]
                    if one.index <= max(each.index for each in operation.outputs)
                    and one.index not in self._cut
                    and self._axis.has(one)
                ]
                if bad or value.index not in self._cut:
                    raise self._refused(f"{_name(step)} writes a rank's tokens into what is whole", step)

    def _check_passes(self) -> None:
        """All passes of a place in the program are changed alike."""
        for at, passes in self._done.items():
            calls = [self._trace.calls[index] for index in passes]
            others = [one for one in self._sites.alike(calls[0]) if one.index not in passes]
            if others:
                raise self._refused(
                    f"{at.call.function} is given a rank's tokens in some passes only", others[0]
                )

    def _at(self, call: FunctionCall) -> At:
        at = At(call.module.path, self._sites.name(call))
        self._done[at].add(call.index)
        return at

    def _refused(self, cause: str, step: FunctionCall | Operation, remedy: str = _REMEDY) -> PlanError:
        module = "" if step.module is None else step.module.path
        call = step if isinstance(step, FunctionCall) else step.call
        place = ""
        if call is not None:
            site = call.origin
            place = f" ({short_path(site.file)}:{site.line} in {site.code.co_name})"
        return PlanError(module, cause + place, remedy)


def _inputs_behind(value: Value) -> set[str]:
    """Names of the arguments of the model from which a value is made."""
    found: set[str] = set()
    seen: set[int] = set()
    open_values = [value]
    while open_values:
        one = open_values.pop()
        if one.index in seen:
            continue
        seen.add(one.index)
        if one.source.kind == "input":
            found.add(one.source.name.split(".")[0])
        elif one.producer is not None:
            open_values += one.producer.inputs
    return found


def _name(step: FunctionCall | Operation) -> str:
    return step.name


def _argument(call: FunctionCall, name: str) -> Any:
    """An argument of attention or of a loss, its default where it was not given."""
    signature = _SIGNATURES[call.name]
    bound = signature.bind(*call.arguments, **call.keywords)
    bound.apply_defaults()
    return bound.arguments[name]


def _attention_signature(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> None:
    """Arguments of the builtin, which has no signature."""


_SIGNATURES = {
    "scaled_dot_product_attention": inspect.signature(_attention_signature),
    **{function.__name__: inspect.signature(function) for function in LOSSES},
}
