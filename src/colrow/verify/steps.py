"""Optimizer steps of both models, and what they have made of the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from colrow.parameters import clip_grad_norm_
from colrow.replicas import check_replicas
from colrow.verify.compare import MISSING, compare_tensors, least_gradient, local_parts
from colrow.verify.exchange import RanksRaised
from colrow.verify.measure import FLOOR, magnitude
from colrow.verify.precision import is_number
from colrow.verify.report import Check, Difference, merge
from colrow.verify.verification import Case, Compared, Stopped, Verification

MOMENTUM, WEIGHT_DECAY = 0.9, 0.1
STEP = 1e-3
"""Length of a step relative to the length of the vector of all parameters."""


class Steps:
    """Optimizer steps.

    The optimizer is linear in the gradients (SGD with momentum and weight decay), so that an error of the
    parameters is an error of what was computed. Adam would divide by the gradients' own size, and blow up
    rounding where they are zero.

    After the first step the parameters are equal but for rounding, which the model itself may blow up: a deep
    one by several digits. So where a later step differs although the parameters agree, it is compared once
    more from parameters that are equal, as they are at the first step.

    Args:
        verification: compares, and collects what it finds.
        case: of all steps.
    """

    def __init__(self, verification: Verification, case: Case) -> None:
        self._verification, self._case = verification, case
        self._before: dict[str, Tensor] = {
            name: one.detach().clone() for name, one in verification.model.named_parameters()
        }

    def compare(self, steps: int) -> None:
        """Compare gradients in each step, and parameters, buffers and replicas after the last.

        Args:
            steps: at least 1.

        Raises:
            Stopped: if the parallelized model raised.
            OriginalRaised: if the original did.
        """
        original, model = self._verification.original, self._verification.model
        parameters = [one for one in original.parameters() if one.requires_grad]
        if not parameters:
            self._verification.notes.append("no optimizer steps were compared: no parameter wants a gradient")
            return
        length = float(torch.nn.utils.get_total_norm([one.detach() for one in parameters]))
        optimizers: list[torch.optim.Optimizer] = []
        for step in range(steps):
            case = replace(self._case, stage=f"step {step + 1}")
            least = self._gradients(case, is_first=not step)
            if not optimizers:
                # clipping has to act, and a step to be neither lost in rounding nor to blow the model up
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                limit = 0.5 * float(norm) if 0 < float(norm) < math.inf else 1.0
                rate = STEP * length / limit
                optimizers = [
                    torch.optim.SGD(one.parameters(), rate, MOMENTUM, weight_decay=WEIGHT_DECAY)
                    for one in (original, model)
                ]
            self._clip(case.stage, limit, least)
            for optimizer in optimizers:
                optimizer.step()
        stage = f"after {steps} steps"
        self._update(self._parameters(stage))
        self._update(self._buffers(stage))
        self._update(self._replicas(stage))

    def _gradients(self, case: Case, *, is_first: bool) -> float:
        """Compare the gradients of one step; returns by what they are measured at least."""
        compared = self._verification.run_both(case)
        if compared.differs and not is_first:
            before = self._parameters(f"before {case.stage}")
            if all(check.passed for check in before):
                checks = compared.checks
                del compared  # large models have no room for the gradients of two runs
                compared = self._from_equal_parameters(case, checks, before)
        self._verification.keep(compared)
        return least_gradient(compared.expected.outputs.values.values())

    def _from_equal_parameters(
        self, case: Case, checks: Sequence[Check], before: Sequence[Check]
    ) -> Compared:
        """The same step from equal parameters.

        Args:
            case: the step.
            checks: of the step as it was.
            before: of the parameters that it began with.
        """
        verification = self._verification
        whole = {name: one.detach() for name, one in verification.original.named_parameters()}
        parts = local_parts(verification.model, whole)
        with torch.no_grad():
            for name, one in verification.model.named_parameters():
                one.copy_(parts[name])
        again = verification.run_both(case)
        if not again.differs:
            worst = max((check for check in checks if not check.passed), key=lambda one: one.error)
            drift = max((check.error for check in before), default=0.0)
            verification.notes.append(
                f"{case.stage}: was compared from equal parameters: the model makes {worst.error:.1e} in "
                f"{worst.name} of the {drift:.1e} by which the parameters differed, in rounding"
            )
        return again

    def _clip(self, stage: str, limit: float, least: float) -> None:
        verification = self._verification
        expected = torch.nn.utils.clip_grad_norm_(verification.original.parameters(), limit)
        model = verification.model
        try:
            found = verification.exchange.together(lambda: clip_grad_norm_(model, limit), model)
        except RanksRaised as raised:
            error = Check(stage, "errors", "colrow.clip_grad_norm_ raised", MISSING, 0.0, str(raised))
            verification.add([error])
            raise Stopped from raised
        norms = {"gradients": found}, {"gradients": expected}
        checks = compare_tensors(stage, "norm", *norms, verification.tolerance, 0.0, least=least)
        self._update(merge(verification.exchange.gather(checks)))

    def _parameters(self, stage: str) -> list[Check]:
        """Parameters, by the size of what the steps have changed."""
        verification = self._verification
        whole = {name: one.detach() for name, one in verification.original.named_parameters()}
        found = {name: one.detach() for name, one in verification.model.named_parameters()}
        parts = local_parts(verification.model, whole)
        changes = {name: magnitude(part - self._before[name]) for name, part in parts.items()}
        of_ranks = verification.exchange.gather(changes)
        sizes = {name: max(one[name] for one in of_ranks) for name in changes}
        checks = compare_tensors(stage, "parameters", found, parts, verification.tolerance, FLOOR, sizes)
        return merge(verification.exchange.gather(checks))

    def _buffers(self, stage: str) -> list[Check]:
        verification = self._verification
        whole = _buffers_of(verification.original)
        parts = local_parts(verification.model, whole)
        sizes = {name: magnitude(one) for name, one in whole.items()}
        found = _buffers_of(verification.model)
        checks = compare_tensors(stage, "buffers", found, parts, verification.tolerance, FLOOR, sizes)
        return merge(verification.exchange.gather(checks))

    def _replicas(self, stage: str) -> list[Check]:
        name, model = "equal to the bit on all ranks", self._verification.model
        try:
            self._verification.exchange.together(lambda: check_replicas(model), model)
            return [Check(stage, "replicas", name, 0.0, 0.0)]
        except RanksRaised as raised:
            return [Check(stage, "replicas", name, MISSING, 0.0, raised.first.error)]

    def _update(self, checks: Sequence[Check]) -> None:
        """Add checks of what happens between a backward and the next forward."""
        verification = self._verification
        failed = verification.add(checks)
        if failed and verification.difference is None:
            first = failed[0]
            path, _, parameter = first.name.rpartition(".")
            is_known = path in dict(verification.original.named_modules()) and bool(parameter)
            kind = type(verification.original.get_submodule(path)).__name__ if is_known else ""
            detail = f"{first.kind}: {first.name}" + (f" ({first.note})" if first.note else "")
            verification.difference = Difference(
                "update", path if is_known else "", kind, error=first.error, detail=detail, stage=first.stage
            )


def _buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach() for name, one in model.named_buffers() if is_number(one)}
