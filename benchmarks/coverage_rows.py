"""What is known of one model at the end of its run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Row:
    """One model of the table.

    Attributes:
        name: of the model.
        runs: whether the model itself can be called, before anything is done to it.
        traced, planned: whether it got that far.
        share_cut: of its parameters, by their number of elements, the share that lies on a cut axis.
        exact: whether outputs, gradients and parameters are those of the uncut model.
        predicted: whether the collectives were those that the plan predicts.
        first_difference: where they part, if they do.
        error: what ended the run, if something did.
        stage: what was under way then: ``build``, ``run``, ``trace``, ``plan``, ``verify``; else ``done``.
        seconds: that all of it took.
        parameters: elements of all parameters.
        unknown: operators without a rule.
        notes: what the trace had to guess, and what the plan says stayed whole.
        detail: traceback of the error, what was compared, or the last lines that the processes printed.
    """

    name: str
    runs: bool = False
    traced: bool = False
    planned: bool = False
    share_cut: float = 0.0
    exact: bool = False
    predicted: bool = False
    first_difference: str = ""
    error: str = ""
    stage: str = "build"
    seconds: float = 0.0
    parameters: int = 0
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    detail: str = ""
