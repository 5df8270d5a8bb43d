"""Operators whose results would be too large are stopped before they take the memory."""

from __future__ import annotations

import pytest
import torch

from colrow.model.memory import LARGEST, LimitedTensors, TooLargeError


def test_a_product_that_would_take_a_hundred_gigabytes() -> None:
    with LimitedTensors(), pytest.raises(TooLargeError, match=r"aten.mm.* shape \[200000, 200000\]"):
        torch.ones(200_000, 1) @ torch.ones(1, 200_000)


def test_numbers_of_things_that_were_found_are_counted_too() -> None:
    found = torch.ones(400, 400).nonzero()
    with LimitedTensors(), pytest.raises(TooLargeError):
        found[:, :1] - found[:, 1]


def test_all_else_is_as_without() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 300, generator=generator) for _ in range(2))
    expected = (a @ b.T).softmax(-1).sum(0)
    with LimitedTensors():
        assert torch.equal((a @ b.T).softmax(-1).sum(0), expected)
        assert torch.ones(LARGEST // 1024).expand(1024, -1).shape[0] == 1024
        assert int(torch.ones(100, 100).nonzero().sum()) == 100 * 9900
