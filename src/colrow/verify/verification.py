"""The proof itself: one comparison after the other, and the search for the cause of the first difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from colrow.parameters import clip_grad_norm_
from colrow.replicas import check_replicas
from colrow.state import state_of
from colrow.trace import Example
from colrow.verify.compare import (
    MISSING,
    OUTPUT_FLOOR,
    compare_collectives,
    compare_kept,
    compare_tensors,
    local_parts,
    without_numbers,
)
from colrow.verify.exchange import Exchange, RanksRaised
from colrow.verify.inputs import other_sizes
from colrow.verify.localise import Localiser
from colrow.verify.measure import FLOOR, magnitude
from colrow.verify.record import recorded
from colrow.verify.report import Check, Difference, merge
from colrow.verify.run import Objective, Run, Runner, RunRaised

MOMENTUM, WEIGHT_DECAY = 0.9, 0.1
STEP = 1e-3
"""Length of a step relative to the length of the vector of all parameters."""


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


class Verification:
    """Compares two models, on every rank alike, and collects what it finds.

    Args:
        original, model: the whole model, and the same model parallelized.
        runner: runs them.
        tolerance: of errors relative to the largest magnitude.

    Attributes:
        checks: everything that was compared.
        notes: what was not, and why.
        difference: where the models first part.
    """

    def __init__(self, original: nn.Module, model: nn.Module, runner: Runner, tolerance: float) -> None:
        self._original, self._model = original, model
        self._runner, self._tolerance = runner, tolerance
        self._exchange: Exchange = runner.exchange
        self._objectives: dict[str, Objective] = {}
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.difference: Difference | None = None

    def everything(self, examples: Mapping[str, Example], steps: int, *, with_bytes: bool) -> None:
        """All comparisons, unless the parallelized model raises.

        Args:
            examples: by mode.
            steps: of the optimizer.
            with_bytes: compare predicted bytes of collectives as well: the plan was made for these examples.

        Raises:
            OriginalRaised: if the original model cannot be run.
        """
        try:
            for mode, example in examples.items():
                expected, found = self.compare(Case(mode, mode, example, "outputs"))
                self._objectives[mode] = "loss" if expected.outputs.loss_name else "outputs"
                if expected.outputs.loss_name:
                    _, found = self.compare(Case(f"{mode}, loss alone", mode, example, "loss"))
                self._collectives(mode, found, with_bytes=with_bytes)
                self._other_size(mode, example)
            mode = "training" if "training" in examples else next(iter(examples))
            self._steps(mode, examples[mode], steps)
        except Stopped:
            pass

    def compare(self, case: Case) -> tuple[Run, Run]:
        """One forward and backward of both models: outputs and gradients.

        Returns:
            What the original gave, and what the parallelized model gave.

        Raises:
            Stopped: if it raised.
            OriginalRaised: if the original did.
        """
        for one in (self._original, self._model):
            one.train(case.mode == "training")
        case, expected = self._run_original(case)
        try:
            found = self._run(self._model, case)
        except RunRaised as failed:
            note = str(failed)
            self._add([Check(case.stage, "errors", "the parallelized model raised", MISSING, 0.0, note)])
            self.difference = self.difference or self._raised(case, failed)
            raise Stopped from failed
        differing = self._compare_runs(case, found, expected)
        if differing and self.difference is None:
            self.difference = self._locate(case, differing)
        return expected, found

    # runs

    def _run(self, model: nn.Module, case: Case) -> Run:
        return self._runner.run(model, case.example, case.objective, differentiable=case.differentiable)

    def _run_original(self, case: Case) -> tuple[Case, Run]:
        """The case as it can be run: inputs that a model writes to cannot want gradients."""
        buffers = {name: one.clone() for name, one in self._original.named_buffers()}
        try:
            return case, self._run(self._original, case)
        except RunRaised:
            # what it has noted until then, such as statistics of the batch, the other model has not
            for name, one in self._original.named_buffers():
                if name in buffers:
                    one.copy_(buffers[name])
        case = replace(case, differentiable=False)
        try:
            return case, self._run(self._original, case)
        except RunRaised as failed:
            raise OriginalRaised(
                f"the original model raised, {case.stage}, {failed.direction}: {failed}"
            ) from failed

    def _compare_runs(self, case: Case, found: Run, expected: Run) -> list[Check]:
        """The checks that failed."""
        stage, everything = case.stage, case.objective == "outputs"
        tolerance = self._tolerance
        outputs, whole = dict(found.outputs.values), dict(expected.outputs.values)
        if not everything:  # other outputs, such as logits, may be cut
            name = expected.outputs.loss_name
            outputs, whole = (
                {key: value for key, value in one.items() if key == name} for one in (outputs, whole)
            )
        checks = compare_tensors(stage, "outputs", outputs, whole, tolerance, OUTPUT_FLOOR)
        parts = local_parts(self._model, expected.gradients)
        sizes = {name: magnitude(one) for name, one in expected.gradients.items()}
        checks += compare_tensors(stage, "gradients", found.gradients, parts, tolerance, FLOOR, sizes)
        merged = merge(self._exchange.gather(checks))
        if everything:
            merged += compare_kept(stage, found.outputs, expected.outputs, tolerance, self._exchange)
        empty = without_numbers(whole) + without_numbers(expected.gradients)
        if empty:
            self.notes.append(
                f"{stage}: the original's {', '.join(empty[:4])} are no numbers, which proves little"
            )
        return self._add(merged)

    def _add(self, checks: Sequence[Check]) -> list[Check]:
        self.checks += checks
        return [check for check in checks if not check.passed]

    # stages

    def _collectives(self, mode: str, run: Run, *, with_bytes: bool) -> None:
        prediction = state_of(self._model).plan.prediction
        if prediction is None:
            note = "the plan predicts no collectives: they were not compared with those counted"
            self.notes += [] if note in self.notes else [note]
            return
        rank = state_of(self._model).communicator.rank
        checks = compare_collectives(mode, mode, prediction, run.counted, rank, with_bytes=with_bytes)
        self._add(merge(self._exchange.gather(checks)))

    def _other_size(self, mode: str, example: Example) -> None:
        refused = []
        for description, resized in other_sizes(example):
            try:
                self.compare(Case(f"{mode}, {description}", mode, resized, "outputs"))
                return
            except OriginalRaised as error:
                refused.append(str(error))
        reason = refused[0] if refused else "there is no tensor with a batch dimension among its inputs"
        self.notes.append(f"{mode}: no second size was compared: {reason}")

    def _steps(self, mode: str, example: Example, steps: int) -> None:
        """Optimizer steps, and what they have made of the parameters.

        The optimizer is linear in the gradients (SGD with momentum and weight decay), so that an error of the
        parameters is an error of what was computed. Adam would divide by the gradients' own size, and blow up
        rounding where they are zero.
        """
        parameters = [one for one in self._original.parameters() if one.requires_grad]
        if not steps or not parameters:
            self.notes += ["no optimizer steps were compared: no parameter wants a gradient"] if steps else []
            return
        before = {name: one.detach().clone() for name, one in self._model.named_parameters()}
        length = float(torch.sqrt(sum((one.detach() ** 2).sum() for one in parameters)))  # type: ignore[arg-type]
        optimizers: list[torch.optim.Optimizer] = []
        for step in range(steps):
            stage = f"step {step + 1}"
            self.compare(Case(stage, mode, example, self._objectives[mode]))
            if not optimizers:
                # clipping has to act, and a step to be neither lost in rounding nor to blow the model up
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                limit = 0.5 * float(norm) if 0 < float(norm) < math.inf else 1.0
                rate = STEP * length / limit
                optimizers = [
                    torch.optim.SGD(one.parameters(), rate, MOMENTUM, weight_decay=WEIGHT_DECAY)
                    for one in (self._original, self._model)
                ]
            self._clip(stage, limit)
            for optimizer in optimizers:
                optimizer.step()
        stage = f"after {steps} steps"
        self._compare_parameters(stage, before)
        self._compare_buffers(stage)
        self._replicas(stage)

    def _clip(self, stage: str, limit: float) -> None:
        expected = torch.nn.utils.clip_grad_norm_(self._original.parameters(), limit)
        try:
            found = self._exchange.together(lambda: clip_grad_norm_(self._model, limit), self._model)
        except RanksRaised as raised:
            self._add([Check(stage, "errors", "colrow.clip_grad_norm_ raised", MISSING, 0.0, str(raised))])
            raise Stopped from raised
        checks = compare_tensors(
            stage, "norm", {"gradients": found}, {"gradients": expected}, self._tolerance, 0.0
        )
        self._update(stage, merge(self._exchange.gather(checks)))

    def _compare_parameters(self, stage: str, before: Mapping[str, Tensor]) -> None:
        """Parameters, by the size of what the steps have changed."""
        whole = {name: one.detach() for name, one in self._original.named_parameters()}
        found = {name: one.detach() for name, one in self._model.named_parameters()}
        parts = local_parts(self._model, whole)
        changes = {name: magnitude(part - before[name]) for name, part in parts.items()}
        of_ranks = self._exchange.gather(changes)
        sizes = {name: max(one[name] for one in of_ranks) for name in changes}
        checks = compare_tensors(stage, "parameters", found, parts, self._tolerance, FLOOR, sizes)
        self._update(stage, merge(self._exchange.gather(checks)))

    def _compare_buffers(self, stage: str) -> None:
        whole = _buffers(self._original)
        parts = local_parts(self._model, whole)
        sizes = {name: magnitude(one) for name, one in whole.items()}
        checks = compare_tensors(
            stage, "buffers", _buffers(self._model), parts, self._tolerance, FLOOR, sizes
        )
        self._update(stage, merge(self._exchange.gather(checks)))

    def _replicas(self, stage: str) -> None:
        try:
            self._exchange.together(lambda: check_replicas(self._model), self._model)
            checks = [Check(stage, "replicas", "equal to the bit on all ranks", 0.0, 0.0)]
        except RanksRaised as raised:
            checks = [
                Check(stage, "replicas", "equal to the bit on all ranks", MISSING, 0.0, raised.first.error)
            ]
        self._update(stage, checks)

    def _update(self, stage: str, checks: Sequence[Check]) -> None:
        """Add checks of what happens between a backward and the next forward."""
        failed = self._add(checks)
        if failed and self.difference is None:
            first = failed[0]
            path, _, parameter = first.name.rpartition(".")
            is_known = path in dict(self._original.named_modules()) and bool(parameter)
            kind = type(self._original.get_submodule(path)).__name__ if is_known else ""
            detail = f"{first.kind}: {first.name}" + (f" ({first.note})" if first.note else "")
            self.difference = Difference(
                "update", path if is_known else "", kind, error=first.error, detail=detail, stage=stage
            )

    # causes

    def _locate(self, case: Case, failed: Sequence[Check]) -> Difference:
        gradients = [check.name for check in failed if check.kind == "gradients"]
        values = [check for check in failed if check.kind != "gradients"]
        localiser = self._record(case, max((one.error for one in failed if one.error < MISSING), default=1.0))
        if isinstance(localiser, Difference):
            return localiser
        difference = localiser.forward() if values else localiser.backward(gradients) or localiser.forward()
        if difference is None:
            # nothing on the way: a part is returned where all was, or an error below what is sought for
            direction: Literal["forward", "backward"] = "forward" if values else "backward"
            first = (values or failed)[0]
            detail = f"{first.kind}: {first.name}" + (f": {first.note}" if first.note else "")
            kind = type(self._original).__name__
            difference = Difference(direction, "", kind, error=first.error, detail=detail)
        return replace(difference, stage=case.stage)

    def _record(self, case: Case, error: float) -> Localiser | Difference:
        """Both models once more, with everything that they compute; a difference already if one raises."""
        with recorded(self._original) as expected:
            expected.parameters = self._run(self._original, case).gradients
        try:
            with recorded(self._model) as found:
                found.parameters = self._run(self._model, case).gradients
        except RunRaised as raised:
            return self._raised(case, raised)
        return Localiser(expected, found, self._original, self._exchange, self._tolerance, error)

    def _raised(self, case: Case, failed: RunRaised) -> Difference:
        first = failed.raised.first
        ranks = failed.raised.ranks
        of_ranks = "" if len(ranks) == self._exchange.size else f"on rank {', '.join(map(str, ranks))} "
        kind = type(self._original.get_submodule(first.module)).__name__
        return Difference(
            failed.direction,
            first.module,
            kind,
            place=first.place,
            text=first.text,
            detail=f"only the parallelized model raises, {of_ranks}{first.error}",
            stage=case.stage,
        )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach() for name, one in model.named_buffers() if one.is_floating_point()}
