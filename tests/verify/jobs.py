"""What ranks of their own run in the tests of verifications."""

from __future__ import annotations

import os

import torch
from torch import Tensor

import colrow
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.verify import models
from tests.verify.planted import changed_reduction

SECONDS = 6.0
"""How long the ranks wait for one another."""


def raise_on_one_rank() -> Report:
    """Rank 1 raises in the middle of the second block, while rank 0 waits for it in a reduction."""
    mesh = colrow.init_mesh(tp=2, device="cpu", timeout=SECONDS)

    def change(tensor: Tensor) -> Tensor:
        if os.environ["RANK"] == "1" and not tensor.is_meta:  # not where the plan is tried out
            raise ArithmeticError("this rank has had enough")
        return tensor

    with changed_reduction("exit bricks.1", change) as met:
        report = verify_on_ranks(models.Bricks, Example((torch.rand(4, 7, 5),)), mesh)
    assert met
    return report
