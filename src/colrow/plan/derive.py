"""Deriving a plan from a model's dataflow: trace, infer, choose, place, localise.

If chosen axes turn out to be impossible to cut, because a collective would have to sit where nothing can be
done or because a number in the program cannot be made local, they stay whole, with the reason among the
plan's notes, and the rest is done again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from colrow.axes import Axes, Registry, infer
from colrow.axes.factor import Reason
from colrow.errors import PlanError
from colrow.layout import Cut
from colrow.localise import Localisation, localise
from colrow.plan.borders import Borders, find_borders
from colrow.plan.candidates import Candidate, find_candidates
from colrow.plan.choose import choose, cut_of, key
from colrow.plan.exits import Reductions, find_reductions
from colrow.plan.fitted import fitted
from colrow.plan.gradients import Summation, find_summations
from colrow.plan.linear import Linearity
from colrow.plan.lower import Actions, lower
from colrow.plan.naming import names_of
from colrow.plan.notes import notes_of
from colrow.plan.plan import Axis, Plan, Sharding
from colrow.plan.predict import predict
from colrow.plan.reads import check_kept, check_reads
from colrow.plan.selection import CannotPlaceError, Chosen, Selection, UnreachableError
from colrow.plan.sequence import SequenceCut, find_sequences, notes_of_sequences, pays
from colrow.plan.states import States
from colrow.plan.tied import holders_of
from colrow.trace import Example, Trace, TraceError, trace_together

#: Axes that turn out to be impossible are taken out one after the other, at most this often.
ATTEMPTS = 64


def derive_plan(
    model: nn.Module,
    examples: Mapping[str, Example],
    ranks: int,
    *,
    share: Sequence[float] | None = None,
    forbid: Collection[str] = (),
    sequence: bool | Literal["auto"] = False,
    registry: Registry | None = None,
) -> Plan:
    """The plan for ``model`` over ``ranks`` ranks, from how it computes.

    Args:
        model: real or on the meta device; not changed, and nothing is computed with it.
        examples: calls of the model by mode; ``training`` is recorded in training mode. What a plan says is
            right for all of them, so there should be one for each way in which the model will be used: with
            labels, without.
        ranks: size of the tensor-parallel group.
        share: relative size of each rank's part, for unequal devices; default: balanced.
        forbid: names of parameters that must stay whole, or of axes, as a plan without this calls them.
        sequence: whether what lies between regions is cut along the sequence as well, see
            :func:`colrow.parallelize`.
        registry: the rules of operators; see :func:`colrow.rule`.

    Raises:
        TraceError: if the model cannot be recorded.
        PlanError: if ``share`` or ``forbid`` do not fit, or ``examples`` are no calls by mode.
    """
    _check_examples(examples)
    trace = record(model, examples)
    return _Derivation(model, examples, infer(trace, registry), ranks, share, forbid, sequence).run()


def _check_examples(examples: Mapping[str, Example]) -> None:
    given = dict(examples) if isinstance(examples, Mapping) else {"examples": None}
    wrong = next((name for name, one in given.items() if not isinstance(one, Example)), None)
    if wrong is not None or not given:
        what = "no call is given" if wrong is None else f"{wrong!r} is no colrow.trace.Example"
        raise PlanError(
            "",
            f"a plan is derived from calls of the model by mode, and {what}",
            'Write {"training": Example((), {"x": x}), "evaluation": ...}, with the arguments and the '
            "keywords of each call; colrow.parallelize and colrow.verify also take the keywords of one call.",
        )


def record(model: nn.Module, examples: Mapping[str, Example]) -> Trace:
    """One trace of all examples; what follows from a choice by data, as of experts, is guessed.

    Raises:
        TraceError: if the model cannot be recorded, as where it branches on other data.
    """
    try:
        return trace_together(model, examples)
    except TraceError:
        return trace_together(model, examples, routing="guess")


@dataclass(frozen=True)
class _Placed:
    """All that was worked out for one selection."""

    selection: Selection
    borders: Borders
    reductions: Reductions
    summations: list[Summation]
    states: States
    actions: Actions
    localisation: Localisation
    sequences: list[SequenceCut] = field(default_factory=list)


class _Derivation:
    def __init__(
        self,
        model: nn.Module,
        examples: Mapping[str, Example],
        axes: Axes,
        ranks: int,
        share: Sequence[float] | None,
        forbid: Collection[str],
        sequence: bool | Literal["auto"],
    ) -> None:
        self._examples, self._sequence = examples, sequence
        self._model, self._axes, self._ranks, self._share = model, axes, ranks, share
        self._forbid = forbid
        self._candidates = find_candidates(axes, ranks) if ranks > 1 else []
        self._banned: dict[str, Reason] = {}
        self._whole_logits: dict[str, Reason] = {}  # by the path of their layer

    def run(self) -> Plan:
        self._forbid_by_name()
        for _ in range(ATTEMPTS):
            chosen = choose(self._axes, self._candidates, self._banned)
            selection = Selection(self._axes, self._named(chosen))
            try:
                placed = self._place(selection)
                plan = self._tried(self._plan(placed), placed)
                return self._with_sequences(plan, placed) if self._sequence and plan.axes else plan
            except CannotPlaceError as error:
                self._ban(error, chosen)
        raise PlanError(
            "",
            f"no plan was found in {ATTEMPTS} attempts; the last reasons were: "
            + "; ".join(str(reason) for reason in list(self._banned.values())[-3:]),
            "Forbid the parameters named here, or write a plan by hand (docs/plans.md).",
        )

    def _with_sequences(self, plan: Plan, placed: _Placed) -> Plan:
        """The plan with what lies between its regions cut along the sequence, where that is asked for.

        Raises:
            PlanError: if it is asked for and nothing can be cut.
        """
        reason = "nothing that leaves a region goes on to what treats every token by itself"
        sequences = find_sequences(
            self._model, placed.states, placed.borders, placed.reductions, placed.summations
        )
        try:
            actions = lower(
                self._model,
                placed.states,
                placed.borders,
                placed.reductions,
                placed.summations,
                sequences,
            )
            cut = replace(placed, actions=actions, sequences=sequences)
            found = self._tried(self._plan(cut), cut) if sequences else plan
        except CannotPlaceError as error:
            sequences, reason = [], str(error.reason)
        if not sequences and self._sequence is True:
            raise PlanError("", f"no sequence can be cut: {reason}", "Leave sequence=True out.")
        if not sequences or (self._sequence == "auto" and not pays(found, plan)):
            return plan
        return replace(found, notes=(*found.notes, *notes_of_sequences(sequences, placed.reductions)))

    def _tried(self, plan: Plan, placed: _Placed) -> Plan:
        """The plan, when one rank's model has run on meta tensors as it says."""
        from colrow.apply.dry_run import dry_run  # what applies plans knows about plans

        if not plan.axes:
            return plan
        smallest = min(
            range(plan.ranks), key=lambda rank: [axis.cut.count(rank) for axis in plan.axes.values()]
        )
        note = dry_run(self._model, self._examples, plan, placed.states, smallest, placed.sequences)
        return plan if note is None else replace(plan, notes=(*plan.notes, note))

    def _ban(self, error: CannotPlaceError, chosen: Sequence[Candidate]) -> None:
        new = {key(one): error.reason for one in error.candidates if key(one) not in self._banned}
        if not new:
            # nothing to blame: all that is left is at fault together
            new = {key(one): error.reason for one in chosen}
        self._banned |= new

    def _forbid_by_name(self) -> None:
        names = set(self._forbid)
        known: set[str] = set()
        chosen = self._named([one for one in self._candidates if not one.illegal])
        labels = {id(one.candidate): one.name for one in chosen}
        for candidate in self._candidates:
            mine = {name for name, _ in candidate.outer.parameters} | {labels.get(id(candidate), "")}
            known |= mine
            if mine & names:
                self._banned[key(candidate)] = Reason("forbidden by the caller")
        if names - known:
            raise PlanError(
                min(names - known), "there is no such parameter or axis to forbid", "Correct forbid."
            )

    def _named(self, chosen: Sequence[Candidate]) -> list[Chosen]:
        names = names_of(self._axes, chosen)
        return [
            Chosen(name, one, cut_of(one, self._ranks, self._share))
            for name, one in zip(names, chosen, strict=True)
        ]

    def _place(self, selection: Selection) -> _Placed:
        borders = self._borders(selection)
        states = States(selection, borders.values)
        linearity = Linearity(states)
        reductions = find_reductions(states, linearity)
        check_reads(states, reductions)
        check_kept(states)
        summations, actions = self._sums(states, borders, reductions)
        localisation = localise(self._model, states, reductions)
        return _Placed(selection, borders, reductions, summations, states, actions, localisation)

    def _borders(self, selection: Selection) -> Borders:
        """Logits are gathered where the program does more with them than cut logits can do."""
        from colrow.apply.loss_trial import try_loss  # what computes losses knows about plans

        while True:
            borders = find_borders(selection, self._whole_logits)
            if borders.loss is None:
                return borders
            logits = borders.losses[0][0]
            sharding = selection.sharding(logits)
            chosen = selection.chosen_of(logits)
            assert chosen is not None
            sizes = [sharding.layout.local_size(chosen.cut, rank) for rank in range(self._ranks)]
            calls = [call for _, call in borders.losses]
            trial = try_loss(self._model, selection.trace, borders.loss, Cut.from_counts(sizes), calls)
            if trial.refused is None:
                borders.loss = replace(borders.loss, fused=trial.fused)
                return borders
            self._whole_logits[borders.loss.logits] = trial.refused

    def _sums(
        self, states: States, borders: Borders, reductions: Reductions
    ) -> tuple[list[Summation], Actions]:
        """Where gradients are summed: at other values, if something cannot be done at the best ones."""
        hidden: frozenset[int] = frozenset()
        while True:
            summations = find_summations(states, reductions, hidden)
            try:
                return summations, lower(self._model, states, borders, reductions, summations)
            except UnreachableError as error:
                if error.values <= hidden:
                    raise
                hidden |= error.values

    def _plan(self, placed: _Placed) -> Plan:
        selection, actions = placed.selection, placed.actions
        kept = self._axes.trace.kept
        parts = sorted({one.label for one in kept if placed.states.is_local(one.value)})
        parameters, buffers = self._shardings(selection)
        shapes = {name: tuple(one.shape) for name, one in _named_tensors(self._model)}
        plan = Plan(
            ranks=self._ranks,
            axes={one.name: Axis(one.name, one.cut) for one in selection.chosen},
            parameters=parameters,
            buffers=buffers,
            entries=tuple(actions.entries),
            exits=tuple(actions.exits),
            lookups=tuple(actions.lookups),
            slices=tuple(actions.slices),
            gathers=tuple(placed.borders.gathers),
            sequence_gathers=tuple(actions.sequence_gathers),
            sequence_slices=tuple(actions.sequence_slices),
            partial_parameters=tuple(actions.partial_parameters),
            once_parameters=tuple(actions.once_parameters),
            attributes=placed.localisation.attributes,
            integers=placed.localisation.integers,
            randomness=tuple(actions.randomness),
            loss=placed.borders.loss,
            holders=holders_of(self._model, parameters),
            shapes=shapes,
            notes=(
                *placed.borders.notes,
                *notes_of(self._axes, self._candidates, selection.chosen, self._banned, parts),
            ),
            prediction=predict(
                selection,
                placed.states,
                placed.borders,
                placed.reductions,
                placed.summations,
                parameters,
                {name for name, one in self._model.named_parameters() if not one.requires_grad},
                placed.sequences,
            ),
        )
        return fitted(plan, selection)

    def _shardings(self, selection: Selection) -> tuple[dict[str, Sharding], dict[str, Sharding]]:
        """Of parameters and of buffers, tied ones under all their names."""
        found: dict[str, Sharding] = {}
        for value in self._axes.trace.values:
            if value.source.kind in ("parameter", "buffer") and selection.is_cut(value):
                found[value.source.name] = selection.sharding(value)
        parameters: dict[str, Sharding] = {}
        first: dict[int, str] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            original = first.setdefault(id(parameter), name)
            if original in found:
                parameters[name] = found[original]
        buffers = {name: one for name, one in found.items() if name not in parameters}
        return parameters, buffers


def _named_tensors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
    return list(named.items())
