"""What a verification has found: every comparison, and where the two models first part."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from colrow.plan import Plan

COLLECTIVES = "collectives"
"""The kind of the checks that compare predicted with counted collectives."""
SHOWN = 12
"""So many of the comparisons that failed are printed one by one."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        stage: mode and size of the inputs, or which step: ``training, batch 2 to 3``.
        kind: ``outputs``, ``gradients``, ``parameters``, ``replicas``, ``collectives``, ...
        name: of the output, the parameter, ...
        error: largest on any rank, relative to the largest magnitude; infinite if something is missing.
        tolerance: what it may be.
        note: what is missing, or on which rank.
    """

    stage: str
    kind: str
    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.stage}: {self.kind}: {self.name}: {_number(self.error)}{note}"


@dataclass(frozen=True)
class Difference:
    """Where the two models first part.

    Attributes:
        direction: ``forward`` or ``backward``; ``update`` for optimizer steps.
        module: path of the module; empty for the model itself.
        module_type: name of its class.
        call: function that it calls there; empty if the module as a whole, or a parameter, is meant.
        place: file and line in the user's program; empty if unknown.
        text: that line.
        error: relative to the largest magnitude; infinite if one of the models raised.
        detail: what is known about the cause.
        stage: see :attr:`Check.stage`.
    """

    direction: Literal["forward", "backward", "update"]
    module: str
    module_type: str
    call: str = ""
    place: str = ""
    text: str = ""
    error: float = math.inf
    detail: str = ""
    stage: str = ""

    def __str__(self) -> str:
        parts: list[str] = [self.direction]
        if self.module_type:
            parts.append(f"module {self.module or '(the model itself)'} ({self.module_type})")
        if self.call or self.place:
            call = f"call {self.call}" if self.call else ""
            at = f"at {self.place}" if self.place else ""
            parts.append(f"{call} {at}".strip())
        if math.isfinite(self.error):
            parts.append(f"error {self.error:.1e}")
        lines = [f"first difference: {', '.join(parts)}"]
        lines += [f"  {self.text}"] if self.text else []
        lines += [f"  {self.detail}"] if self.detail else []
        lines += [f"  in {self.stage}"] if self.stage else []
        return "\n".join(lines)


class VerificationError(RuntimeError):
    """The parallelized model is not equal to the original one, or does not communicate as predicted.

    Attributes:
        report: what was compared.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(str(report))

    def __reduce__(self) -> tuple[type[VerificationError], tuple[Report]]:
        return (VerificationError, (self.report,))


@dataclass(frozen=True)
class Report:
    """The result of a verification.

    Attributes:
        model: name of the model's class.
        ranks: number of ranks.
        dtype: precision of the comparison.
        plan: what was applied.
        share_cut: part of the parameters' elements that lies in parameters that are cut, 0 to 1.
        checks: everything that was compared.
        notes: what could not be compared, and why.
        difference: where the models first part, if they do and it was found.
        plan_seconds: time it took to derive the plan.
        seconds: time of everything, without starting the ranks.
        mesh: sizes of its dimensions, where there are more than ``tp``.
    """

    model: str
    ranks: int
    dtype: str
    plan: Plan
    share_cut: float
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    difference: Difference | None
    plan_seconds: float
    seconds: float
    mesh: str = ""

    @property
    def failed(self) -> tuple[Check, ...]:
        """The comparisons that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def exact(self) -> bool:
        """Whether the models are equal, in everything that was compared; whatever the plan has predicted."""
        wrong = [check for check in self.failed if check.kind != COLLECTIVES]
        return bool(self.checks) and not wrong and self.difference is None

    @property
    def passed(self) -> bool:
        """Whether the models are equal, and communicate what the plan has predicted."""
        return self.exact and not self.failed

    def raise_if_different(self) -> None:
        """Raise unless everything is equal.

        Raises:
            VerificationError: with the table and the first difference.
        """
        if not self.passed:
            raise VerificationError(self)

    def as_dictionary(self) -> dict[str, Any]:
        """Numbers and texts only, for JSON; infinite errors become null."""
        return {
            "model": self.model,
            "ranks": self.ranks,
            "mesh": self.mesh,
            "dtype": self.dtype,
            "exact": self.exact,
            "passed": self.passed,
            "share_cut": self.share_cut,
            "plan_seconds": self.plan_seconds,
            "seconds": self.seconds,
            "checks": [_finite(vars(check)) | {"passed": check.passed} for check in self.checks],
            "notes": list(self.notes),
            "difference": _finite(vars(self.difference)) if self.difference else None,
        }

    def __str__(self) -> str:
        ranks = f"{self.ranks} ranks ({self.mesh})" if self.mesh else f"{self.ranks} ranks"
        lines = [
            f"{self.model} over {ranks} in {self.dtype}: {self.share_cut:.1%} of the parameters "
            f"cut ({self.seconds:.1f} s, of which the plan took {self.plan_seconds:.1f} s)",
            "",
            *_table(self.checks),
            *([""] if self.notes else []),
            *(f"note: {note}" for note in self.notes),
            "",
        ]
        if self.passed:
            lines.append(f"equal: all {len(self.checks)} comparisons agree")
            return "\n".join(lines)
        failed = self.failed
        if self.exact:
            lines.append("equal, but the plan does not predict the collectives that were counted:")
        else:
            lines.append(f"DIFFERENT: {len(failed)} of {len(self.checks)} comparisons do not agree")
        lines += [f"  {check}" for check in failed[:SHOWN]]
        lines += [f"  and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
        lines += ["", str(self.difference)] if self.difference else []
        return "\n".join(lines)


def merge(of_ranks: Iterable[Sequence[Check]]) -> list[Check]:
    """The checks of all ranks as one list: of each the rank where the error is largest."""
    worst: dict[tuple[str, str, str], Check] = {}
    for rank, checks in enumerate(of_ranks):
        for check in checks:
            key = (check.stage, check.kind, check.name)
            # what is no number counts as worse than any
            if key not in worst or not check.error <= worst[key].error:
                note = check.note or ("" if check.passed else f"largest on rank {rank}")
                worst[key] = Check(*key, check.error, check.tolerance, note)
    return list(worst.values())


def _table(checks: Sequence[Check]) -> list[str]:
    """One line for each stage and kind."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        # the steps of an optimizer are alike
        stage = re.sub(r"^step \d+$", "steps", check.stage)
        groups.setdefault((stage, check.kind), []).append(check)
    rows = [("compared", "number", "largest error", "tolerance", "")]
    for (stage, kind), group in groups.items():
        worst = max(group, key=lambda check: (not check.passed, check.error))
        equal = "equal" if all(check.passed for check in group) else "DIFFERENT"
        tolerance = f"{worst.tolerance:.0e}" if worst.tolerance else "exact"
        rows.append((f"{stage}: {kind}", str(len(group)), _number(worst.error), tolerance, equal))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [
            first.ljust(widths[0]),
            *(one.rjust(width) for one, width in zip(others[:-1], widths[1:], strict=False)),
        ]
        lines.append("  ".join([*cells, others[-1]]).rstrip())
    return lines


def _number(error: float) -> str:
    if error == 0:
        return "0"
    return f"{error:.1e}" if math.isfinite(error) else "-"


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }
