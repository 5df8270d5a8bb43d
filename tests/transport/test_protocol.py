"""The flags protocol, checked in every order of steps; and that the checker finds what is left out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from tests.transport.model import Model, Sleep, program

KINDS = [("one_shot", 1), ("in_chunks", 3), ("scatter", 3), ("exchange", 3), ("barrier", 1)]


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("operations", list(itertools.product(KINDS, repeat=2)), ids=str)
def test_two_ranks(operations: list[tuple[str, int]], slots: int) -> None:
    """Every pair of operations, and a large one around them that uses all slots again."""
    around = [("in_chunks", slots + 1)]
    assert Model(program([*around, *operations, *around], slots), 2).check() == ""


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_three_ranks(kind: tuple[str, int]) -> None:
    operations = [("one_shot", 1), kind, ("scatter", 2)]
    assert Model(program(operations, 2), 3).check() == ""


@pytest.mark.slow
def test_three_ranks_for_longer() -> None:
    operations = [("in_chunks", 3), ("one_shot", 1), ("in_chunks", 3), ("scatter", 2)]
    assert Model(program(operations, 2), 3).check() == ""


def test_every_wait_is_needed() -> None:
    """Leaving out all waits of one kind in large operations is found: the checker can fail."""
    steps = program([("in_chunks", 5), ("in_chunks", 5)], 2)
    kinds = {
        (step.flag, steps[index + 1].kind, bool(steps[index + 1].writes), bool(steps[index + 1].reads))
        for index, step in enumerate(steps)
        if step.kind == "wait"
    }
    assert len(kinds) == 4
    for kind in kinds:
        changed = [
            replace(step, rounds=-1000)
            if step.kind == "wait"
            and (step.flag, (after := steps[index + 1]).kind, bool(after.writes), bool(after.reads)) == kind
            else step
            for index, step in enumerate(steps)
        ]
        assert "reads" in Model(changed, 2).check(), f"nobody notices that {kind} is left out"


def test_a_slot_too_few_is_found() -> None:
    """Waiting for a round too early lets a rank write what another still reads."""
    steps = [
        replace(step, rounds=step.rounds - 1) if step.kind == "wait" and step.flag == "reduced" else step
        for step in program([("scatter", 5)], 2)
    ]
    assert "reads" in Model(steps, 2).check()


def test_what_is_given_needs_data_after_it() -> None:
    """What an all-to-all tells may be overwritten by the next because data are always staged between."""
    assert Model(program([("exchange", 2), ("exchange", 2)], 2), 3).check() == ""
    assert "given" in Model(program([("exchange", 1), ("exchange", 1)], 2), 2).check()


@pytest.mark.parametrize("sleepers", [1, 2, 3])
def test_nobody_sleeps_for_ever(sleepers: int) -> None:
    assert Sleep(sleepers=sleepers).check() == ""
    assert "sleeps" in Sleep(fence=False, sleepers=sleepers).check()
