"""Errors between tensors, and what parts on ranks are to the whole."""

from __future__ import annotations

import math

import pytest
import torch

from colrow.verify.measure import largest_error, magnitude, relate

TOLERANCE = 1e-9


def test_error_is_relative_to_the_largest_magnitude() -> None:
    expected = torch.tensor([100.0, 1.0, -4.0], dtype=torch.float64)
    assert largest_error(expected + torch.tensor([0.0, 0.5, 0.0]), expected) == pytest.approx(0.005)
    assert largest_error(expected.clone(), expected) == 0.0
    assert largest_error(expected[:2], expected) == math.inf
    assert largest_error(expected[:0], expected[:0]) == 0.0


def test_what_is_zero_is_measured_by_the_floor() -> None:
    zero, rounding = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1e-17, dtype=torch.float64)
    assert largest_error(rounding, zero) == math.inf
    assert largest_error(rounding, zero, 1.0) == pytest.approx(1e-17)
    assert largest_error(zero, rounding, 1.0) == pytest.approx(1e-17)
    assert largest_error(zero, zero) == 0.0


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_must_be_so_in_both(odd: float) -> None:
    expected = torch.tensor([1.0, odd, 3.0], dtype=torch.float64)
    assert largest_error(expected.clone(), expected) == 0.0
    assert largest_error(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), expected) == math.inf
    assert largest_error(expected, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) == math.inf
    assert largest_error(torch.tensor([1.5, odd, 3.0], dtype=torch.float64), expected) > 0.1


def test_masks_do_not_hide_errors() -> None:
    lowest = torch.finfo(torch.float64).min
    expected = torch.tensor([lowest, 0.25, 4.0], dtype=torch.float64)
    assert magnitude(expected) == 4.0
    assert largest_error(torch.tensor([lowest, 0.25, 4.4], dtype=torch.float64), expected) == pytest.approx(
        0.1
    )
    assert largest_error(torch.tensor([lowest * 0.5, 0.25, 4.0], dtype=torch.float64), expected) == 0.5


def test_complex_numbers() -> None:
    expected = torch.tensor([1 + 1j, 3 - 4j])
    assert largest_error(expected + torch.tensor([0j, 0.5j]), expected) == pytest.approx(0.1)


def _whole() -> torch.Tensor:
    return torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_whole_parts_and_sums_are_told_apart() -> None:
    whole = _whole()
    assert relate([whole, whole.clone()], whole, TOLERANCE).kind == "whole"
    cut = relate([whole[:, :4], whole[:, 4:]], whole, TOLERANCE)
    assert (cut.kind, cut.dimension, cut.same_shape) == ("cut", 1, False)
    half = torch.randn_like(whole)
    assert relate([half, whole - half], whole, TOLERANCE).kind == "sum"
    other = relate([whole, whole + half], whole, TOLERANCE)
    assert other.kind == "none"
    assert other.same_shape
    assert other.error > 0.1


def test_parts_may_be_packed_shared_or_empty_but_not_missing() -> None:
    whole = _whole()
    packed = [whole[:, [0, 2, 4]], whole[:, [1, 3, 5]]]
    assert relate(packed, whole, TOLERANCE).kind == "cut"
    shared = [whole[:, :4], whole[:, 3:]]
    assert relate(shared, whole, TOLERANCE).kind == "cut"
    assert relate([whole[:, :0], whole], whole, TOLERANCE).kind == "cut"
    missing = relate([whole[:, :3], whole[:, 4:]], whole, TOLERANCE)
    assert missing.kind == "none"
    assert not missing.same_shape
    wrong = [whole[:, :3], whole[:, 3:] * 1.5]
    assert relate(wrong, whole, TOLERANCE).kind == "none"
    assert relate([whole[:2, :3], whole[2:, 3:]], whole, TOLERANCE).error == math.inf
    assert relate([whole[0], whole[1]], whole, TOLERANCE).kind == "none"


def test_equal_slices_and_masks_are_matched() -> None:
    whole = torch.zeros(3, 6, dtype=torch.float64)
    whole[:, 2] = -math.inf
    assert relate([whole[:, :3], whole[:, 3:]], whole, TOLERANCE).kind == "cut"
    assert relate([whole[:, :2], whole[:, 3:]], whole, TOLERANCE).kind == "none"
