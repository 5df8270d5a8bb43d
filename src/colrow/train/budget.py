"""How many steps a training has."""

from __future__ import annotations

from statistics import median

import torch

from colrow.collectives import Communicator
from colrow.train.configuration import CALIBRATION_STEPS

_UNUSUAL = 2
"""The first steps are slow: memory is allocated, kernels are chosen."""


class Budget:
    """The number of steps: given, or found from the duration of the first ones.

    After that it never changes, so that the schedule is the same function of the step from begin to end.

    Args:
        steps: the number, if it is known.
        minutes: otherwise, how long the training should take.
        evaluation_share: duration of validations per step, as a fraction of a step's.
    """

    def __init__(self, steps: int | None, minutes: float | None, evaluation_share: float = 0.0) -> None:
        self.steps = steps
        self._minutes = minutes
        self._evaluation_share = evaluation_share
        self._durations: list[float] = []

    def tick(self, done: int, seconds: float, ranks: Communicator, device: torch.device) -> bool:
        """A step has ended, on all ranks.

        Args:
            done: number of steps done.
            seconds: that this one took.
            ranks: that must agree; the first one's clock counts.
            device: for what they exchange.

        Returns:
            Whether the number of steps has just become known.
        """
        if self.steps is not None:
            return False
        self._durations.append(seconds)
        if done < CALIBRATION_STEPS:
            return False
        assert self._minutes is not None
        own = done + steps_that_fit(self._minutes * 60, self._durations, self._evaluation_share)
        token = torch.tensor([own], device=device)
        self.steps = int(ranks.broadcast(token, 0, label="number of steps"))
        return True


def steps_that_fit(seconds: float, durations: list[float], evaluation_share: float) -> int:
    """How many more steps fill the time after the steps that took ``durations``; at least one."""
    typical = median(durations[_UNUSUAL:] or durations) * (1 + evaluation_share)
    return max(1, int((seconds - sum(durations)) / typical))
