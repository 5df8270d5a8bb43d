"""How far two tensors are apart, and how the ranks' parts of a value lie to the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest error relative to the largest magnitude of a tensor, by the precision of the comparison."""
FLOOR = 1e-3
"""A tensor whose numbers are all smaller than this part of the largest among its kind is measured by that.

Some gradients are zero but for rounding, such as that of a bias of keys, which softmax ignores: relative to
their own magnitude they are nothing but error."""


HUGE = 1e30
"""What is larger, as in masks of attention, is compared by itself and says nothing of the others' size."""


def magnitude(tensor: Tensor) -> float:
    """The largest magnitude, without huge ones; 0 if there is none."""
    if not tensor.numel():
        return 0.0
    largest = float(torch.linalg.vector_norm(tensor.detach(), torch.inf))
    if largest < HUGE:
        return largest
    sizes = tensor.detach().abs()
    return float(torch.where(sizes < HUGE, sizes, 0.0).max())


def largest_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest magnitude of ``expected``, or to ``floor`` if larger.

    Infinite numbers and those that are none must be so in both. Infinite if the shapes differ.
    """
    return largest_difference(found, expected, max(magnitude(expected), floor))


def largest_difference(found: Tensor, expected: Tensor, size: float) -> float:
    """The largest difference, relative to ``size``; see :func:`largest_error`."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    found, expected = found.detach(), expected.detach()
    difference = float(torch.linalg.vector_norm(found - expected, torch.inf))
    if difference == 0.0:
        return 0.0
    if size > 0 and difference < HUGE and magnitude(found) < HUGE:
        return difference / size
    return _difference_of_odd_numbers(found, expected, size)


def _difference_of_odd_numbers(found: Tensor, expected: Tensor, size: float) -> float:
    """The same where some numbers may be huge, infinite or none."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    if same.all():
        return 0.0
    sizes = expected.abs()
    scale = torch.where(sizes >= HUGE, sizes, size)
    # whether infinite, no number, or 0 / 0: it is on one side only
    errors = torch.where(same, 0.0, (found - expected).abs() / scale).nan_to_num(torch.inf, torch.inf)
    return float(errors.max())


@dataclass(frozen=True)
class Relation:
    """What the ranks' tensors are to the tensor of the whole model.

    Attributes:
        kind: ``whole``: equal on each rank; ``cut``: parts of it along ``dimension``; ``sum``: their sum is
            equal; ``none`` of these.
        error: the smallest error among those found.
        dimension: see above; -1 if not cut.
        same_shape: every rank has the shape of the whole.
    """

    kind: Literal["whole", "cut", "sum", "none"]
    error: float
    dimension: int = -1
    same_shape: bool = True

    def __str__(self) -> str:
        return {
            "whole": "whole",
            "cut": f"cut along dimension {self.dimension}",
            "sum": "a sum over the ranks that is pending",
            "none": f"different by {self.error:.1e}",
        }[self.kind]


def relate(parts: Sequence[Tensor], expected: Tensor, tolerance: float, floor: float = 0.0) -> Relation:
    """Find out what the ranks' tensors ``parts`` are to ``expected``.

    A part need not be consecutive, nor be held by one rank only: it is taken for a part if each of its slices
    along the dimension is one of the whole tensor's, and each of the latter is held by some rank.
    """
    if all(part.shape == expected.shape for part in parts):
        whole = max(largest_error(part, expected, floor) for part in parts)
        if whole <= tolerance:
            return Relation("whole", whole)
        total = largest_error(torch.stack(list(parts)).sum(0), expected, floor)
        return Relation("sum", total) if total <= tolerance else Relation("none", whole)
    dimension = _cut_dimension(parts, expected)
    if dimension is None:
        return Relation("none", float("inf"), same_shape=False)
    error = _distance_of_slices(torch.cat(list(parts), dimension), expected, dimension, floor)
    kind: Literal["cut", "none"] = "cut" if error <= tolerance else "none"
    return Relation(kind, error, dimension, same_shape=False)


def _cut_dimension(parts: Sequence[Tensor], expected: Tensor) -> int | None:
    """The one dimension in which the shapes differ; None if there is not just one."""
    if any(part.dim() != expected.dim() for part in parts):
        return None
    differing = {
        dimension
        for part in parts
        for dimension in range(expected.dim())
        if part.shape[dimension] != expected.shape[dimension]
    }
    return differing.pop() if len(differing) == 1 else None


def _distance_of_slices(found: Tensor, expected: Tensor, dimension: int, floor: float) -> float:
    """How far a slice of one tensor is at most from the nearest of the other's: the Hausdorff distance."""
    ours, theirs = (_rows(tensor, dimension) for tensor in (found, expected))
    if not ours.shape[1]:
        return 0.0
    if not len(ours) or not len(theirs):
        return 0.0 if len(ours) == len(theirs) else float("inf")
    # slices are paired by their projections on one direction, as comparing all pairs would take too long
    length = ours.shape[1] * (2 if ours.is_complex() else 1)
    direction = torch.randn(length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = max(magnitude(expected), floor)
    projections = [_moderate(rows, scale).double() @ direction for rows in (ours, theirs)]
    nearest_theirs = _nearest(projections[0], projections[1])
    nearest_ours = _nearest(projections[1], projections[0])
    return max(
        largest_error(ours, theirs[nearest_theirs], scale), largest_error(ours[nearest_ours], theirs, scale)
    )


def _rows(tensor: Tensor, dimension: int) -> Tensor:
    return tensor.detach().movedim(dimension, 0).flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]


def _moderate(rows: Tensor, scale: float) -> Tensor:
    """Numbers that are huge or none replaced by some that do not drown the others."""
    rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
    scale = scale or 1.0
    return torch.where(rows.abs() < HUGE, rows, (rows > 0) * 2 * scale - 3 * scale)


def _nearest(points: Tensor, among: Tensor) -> Tensor:
    """For each of ``points`` the index of the nearest number ``among`` others."""
    ordered, order = among.sort()
    after = torch.searchsorted(ordered, points).clamp(max=len(ordered) - 1)
    before = (after - 1).clamp(min=0)
    is_after = (ordered[after] - points).abs() < (ordered[before] - points).abs()
    return order[torch.where(is_after, after, before)]
