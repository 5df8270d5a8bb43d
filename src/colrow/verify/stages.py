"""All that is compared, one stage after the other."""

from __future__ import annotations

from collections.abc import Mapping

from colrow.state import state_of
from colrow.trace import Example
from colrow.verify.compare import compare_collectives
from colrow.verify.inputs import other_sizes
from colrow.verify.report import merge
from colrow.verify.run import Objective, Run
from colrow.verify.steps import Steps
from colrow.verify.verification import Case, OriginalRaised, Stopped, Verification


def compare_everything(
    verification: Verification, examples: Mapping[str, Example], steps: int, *, with_bytes: bool
) -> None:
    """All comparisons, unless the parallelized model raises.

    Args:
        verification: compares, and collects what it finds.
        examples: by mode.
        steps: of the optimizer; 0 for none.
        with_bytes: compare predicted bytes of collectives as well: the plan was made for these examples.

    Raises:
        OriginalRaised: if the original model cannot be run.
    """
    objectives: dict[str, Objective] = {}
    try:
        for mode, example in examples.items():
            expected, found = verification.compare(Case(mode, mode, example, "outputs"))
            objectives[mode] = "loss" if expected.outputs.loss_name else "outputs"
            if expected.outputs.loss_name:
                _, found = verification.compare(Case(f"{mode}, loss alone", mode, example, "loss"))
            _compare_collectives(verification, mode, found, with_bytes=with_bytes)
            _compare_other_size(verification, mode, example)
        mode = "training" if "training" in examples else next(iter(examples))
        if steps:
            Steps(verification, Case("", mode, examples[mode], objectives[mode])).compare(steps)
    except Stopped:
        pass


def _compare_collectives(verification: Verification, mode: str, run: Run, *, with_bytes: bool) -> None:
    state = state_of(verification.model)
    prediction = state.plan.prediction
    if prediction is None:
        note = "the plan predicts no collectives: they were not compared with those counted"
        verification.notes += [] if note in verification.notes else [note]
        return
    rank = state.communicator.rank
    checks = compare_collectives(mode, mode, prediction, run.counted, rank, with_bytes=with_bytes)
    verification.add(merge(verification.exchange.gather(checks)))


def _compare_other_size(verification: Verification, mode: str, example: Example) -> None:
    refused = []
    for description, resized in other_sizes(example):
        try:
            verification.compare(Case(f"{mode}, {description}", mode, resized, "outputs"))
            return
        except OriginalRaised as error:
            refused.append(str(error))
    reason = refused[0] if refused else "there is no tensor with a batch dimension among its inputs"
    verification.notes.append(f"{mode}: no second size was compared: {reason}")
