"""Comparing two models, case by case, and the search for the cause of the first difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from colrow.trace import Example
from colrow.verify.compare import (
    MISSING,
    OUTPUT_FLOOR,
    compare_kept,
    compare_tensors,
    least_gradient,
    local_parts,
    without_numbers,
)
from colrow.verify.localise import Localiser
from colrow.verify.measure import FLOOR, magnitude
from colrow.verify.record import recorded
from colrow.verify.report import Check, Difference, merge
from colrow.verify.run import Objective, Run, Runner, RunRaised


class OriginalRaised(ValueError):
    """The original model raised, so that there is nothing to compare with."""


class Stopped(Exception):
    """The parallelized model raised: nothing more can be compared."""


@dataclass(frozen=True)
class Case:
    """One way of running both models.

    Attributes:
        stage: names it in checks.
        mode: ``training`` or another.
        example: the inputs.
        objective: what the gradients are of.
        differentiable: whether floating-point inputs want gradients, as they do where a model is a part of
            another.
    """

    stage: str
    mode: str
    example: Example
    objective: Objective
    differentiable: bool = True


@dataclass(frozen=True)
class Compared:
    """What both models gave for one case, and the checks of one against the other."""

    case: Case
    expected: Run
    found: Run
    checks: tuple[Check, ...]

    @property
    def differs(self) -> bool:
        return not all(check.passed for check in self.checks)


class Verification:
    """Compares two models, on every rank alike, and collects what it finds.

    Args:
        original, model: the whole model, and the same model parallelized.
        runner: runs them.
        tolerance: of errors relative to the largest magnitude.

    Attributes:
        original, model, tolerance: see above.
        exchange: with the other ranks.
        checks: everything that was compared.
        notes: what was not, and why.
        difference: where the models first part.
    """

    def __init__(self, original: nn.Module, model: nn.Module, runner: Runner, tolerance: float) -> None:
        self.original, self.model = original, model
        self.exchange, self.tolerance = runner.exchange, tolerance
        self._runner = runner
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.difference: Difference | None = None

    def compare(self, case: Case) -> tuple[Run, Run]:
        """One forward and backward of both models: outputs and gradients.

        Returns:
            What the original gave, and what the parallelized model gave.

        Raises:
            Stopped: if it raised.
            OriginalRaised: if the original did.
        """
        compared = self.run_both(case)
        self.keep(compared)
        return compared.expected, compared.found

    def run_both(self, case: Case) -> Compared:
        """The same, without adding what was found to the checks; see :meth:`keep`."""
        for one in (self.original, self.model):
            one.train(case.mode == "training")
        case, expected = self._run_original(case)
        try:
            found = self._run_one(self.model, case)
        except RunRaised as failed:
            note = str(failed)
            self.add([Check(case.stage, "errors", "the parallelized model raised", MISSING, 0.0, note)])
            self.difference = self.difference or self._cause_of_error(case, failed)
            raise Stopped from failed
        return Compared(case, expected, found, tuple(self._checks(case, expected, found)))

    def keep(self, compared: Compared) -> None:
        """Add the checks of two runs, and look for the cause if they are the first that differ."""
        differing = self.add(compared.checks)
        if differing and self.difference is None:
            self.difference = self._cause(compared.case, differing)

    def add(self, checks: Sequence[Check]) -> list[Check]:
        """Add checks.

        Returns:
            Those that failed.
        """
        self.checks += checks
        return [check for check in checks if not check.passed]

    # runs

    def _run_one(self, model: nn.Module, case: Case) -> Run:
        return self._runner.run(model, case.example, case.objective, differentiable=case.differentiable)

    def _run_original(self, case: Case) -> tuple[Case, Run]:
        """The case as it can be run: inputs that a model writes to cannot want gradients."""
        buffers = {name: one.clone() for name, one in self.original.named_buffers()}
        try:
            return case, self._run_one(self.original, case)
        except RunRaised:
            # what it has noted until then, such as statistics of the batch, the other model has not
            for name, one in self.original.named_buffers():
                if name in buffers:
                    one.copy_(buffers[name])
        case = replace(case, differentiable=False)
        try:
            return case, self._run_one(self.original, case)
        except RunRaised as failed:
            raise OriginalRaised(
                f"the original model raised, {case.stage}, {failed.direction}: {failed}"
            ) from failed

    def _checks(self, case: Case, expected: Run, found: Run) -> list[Check]:
        """Outputs and gradients of the parallelized model against the original's, the worst of all ranks."""
        is_of_all = case.objective == "outputs"
        expected_outputs, found_outputs = dict(expected.outputs.values), dict(found.outputs.values)
        if not is_of_all:  # other outputs, such as logits, may be cut
            loss = expected.outputs.loss_name
            expected_outputs, found_outputs = (
                {name: value for name, value in outputs.items() if name == loss}
                for outputs in (expected_outputs, found_outputs)
            )
        mine = compare_tensors(
            case.stage, "outputs", found_outputs, expected_outputs, self.tolerance, OUTPUT_FLOOR
        )
        mine += compare_tensors(
            case.stage,
            "gradients",
            found.gradients,
            local_parts(self.model, expected.gradients),
            self.tolerance,
            FLOOR,
            {name: magnitude(one) for name, one in expected.gradients.items()},
            least_gradient(expected_outputs.values()),
        )
        checks = merge(self.exchange.gather(mine))
        if is_of_all:
            checks += compare_kept(case.stage, found.outputs, expected.outputs, self.tolerance, self.exchange)
        self._note_without_numbers(case, expected_outputs, expected.gradients)
        return checks

    def _note_without_numbers(self, case: Case, *expected: Mapping[str, Tensor]) -> None:
        names = [name for tensors in expected for name in without_numbers(tensors)]
        note = f"{case.stage}: the original's {', '.join(names[:4])} are no numbers, which proves little"
        if names and note not in self.notes:
            self.notes.append(note)

    # causes

    def _cause(self, case: Case, failed: Sequence[Check]) -> Difference:
        gradients = [check.name for check in failed if check.kind == "gradients"]
        values = [check for check in failed if check.kind != "gradients"]
        localiser = self._run_recorded(
            case, max((one.error for one in failed if one.error < MISSING), default=1.0)
        )
        if isinstance(localiser, Difference):
            return localiser
        difference = localiser.forward() if values else localiser.backward(gradients) or localiser.forward()
        if difference is None:
            # nothing on the way: a part is returned where all was, or an error below what is sought for
            direction: Literal["forward", "backward"] = "forward" if values else "backward"
            first = (values or failed)[0]
            detail = f"{first.kind}: {first.name}" + (f": {first.note}" if first.note else "")
            kind = type(self.original).__name__
            difference = Difference(direction, "", kind, error=first.error, detail=detail)
        return replace(difference, stage=case.stage)

    def _run_recorded(self, case: Case, error: float) -> Localiser | Difference:
        """Both models once more, with everything that they compute; a difference already if one raises."""
        with recorded(self.original) as expected:
            expected.parameters = self._run_one(self.original, case).gradients
        try:
            with recorded(self.model) as found:
                found.parameters = self._run_one(self.model, case).gradients
        except RunRaised as raised:
            return self._cause_of_error(case, raised)
        return Localiser(expected, found, self.original, self.exchange, self.tolerance, error)

    def _cause_of_error(self, case: Case, failed: RunRaised) -> Difference:
        first = failed.raised.first
        ranks = failed.raised.ranks
        of_ranks = "" if len(ranks) == self.exchange.size else f"on rank {', '.join(map(str, ranks))} "
        kind = type(self.original.get_submodule(first.module)).__name__
        return Difference(
            failed.direction,
            first.module,
            kind,
            place=first.place,
            text=first.text,
            detail=f"only the parallelized model raises, {of_ranks}{first.error}",
            stage=case.stage,
        )
