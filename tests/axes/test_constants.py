"""Constants: how they were put together does not matter, as long as nothing else needs their parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colrow.axes import Axes, Axis, infer
from colrow.trace import trace


class Scaled(nn.Module):
    """Six features, each with a slope; four of the slopes are powers of one number, two of another."""

    def __init__(self, reuse: bool = False, written: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(5, 6, bias=False)
        self.down = nn.Linear(6, 5, bias=False)
        self.reuse, self.written = reuse, written

    def forward(self, x: Tensor) -> Tensor:
        first = torch.pow(torch.tensor(0.5), torch.arange(1, 5))
        if self.written:
            first[0] = x.sum()
        slopes = torch.cat([first, torch.pow(torch.tensor(0.25), torch.arange(1, 5, 2))])
        hidden = self.up(x) * slopes
        if self.reuse:
            hidden = hidden + torch.cat([first.sum().expand(4), slopes[:2]])
        return self.down(hidden)


def hidden_axes(model: Scaled) -> tuple[Axes, list[Axis]]:
    axes = infer(trace(model, (torch.randn(3, 5),)))
    return axes, [axis for axis in axes.all if ("up.weight", 0) in axis.parameters]


def test_concatenated_slopes_are_one_axis_that_is_sliced() -> None:
    axes, (hidden,) = hidden_axes(Scaled())
    assert (hidden.size, hidden.legal) == (6, True)
    (made,) = hidden.iotas
    assert made.name == "aten.cat"
    # what went into it stays whole
    assert not any(axis.iotas and axis.legal and axis.parameters for axis in axes.all if axis is not hidden)


def test_constants_whose_parts_are_needed_elsewhere_keep_them() -> None:
    _, found = hidden_axes(Scaled(reuse=True))
    assert sorted(axis.size for axis in found) == [2, 4]
    assert not any(axis.legal for axis in found)


def test_what_data_is_written_into_is_no_constant() -> None:
    _, found = hidden_axes(Scaled(written=True))
    assert len(found) > 1
    assert not any(axis.legal for axis in found)
