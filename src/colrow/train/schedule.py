"""The learning rate of each step."""

from __future__ import annotations

import math

from colrow.train.configuration import OptimizerConfiguration


def learning_rate(optimizer: OptimizerConfiguration, step: int, steps: int | None) -> float:
    """The learning rate of step 0, 1, ..., steps - 1.

    It rises linearly to its highest value at step ``warmup_steps``, of which step 0 already takes the first
    part, and then stays or falls along half a cosine to its lowest at the last step.

    Args:
        optimizer: highest rate, warm-up, schedule and lowest rate.
        step: counted from 0.
        steps: length of the training; ``None`` while it is not known, which the warm-up does not need.
    """
    highest, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    if optimizer.schedule == "constant":
        return highest
    assert steps is not None
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    lowest = highest * optimizer.final_fraction
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * progress)) / 2
