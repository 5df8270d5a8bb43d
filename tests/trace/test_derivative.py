"""What is found out about functions with a backward of their own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from colrow.trace import trace
from colrow.trace.custom import _forward
from colrow.trace.derivative import examine
from colrow.trace.trial import Finding, Given, Trial
from colrow.trace.written import is_linear, judge, whole_dimensions
from tests.derive import functions


class Relu(Function):
    """Writes into its input; right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.relu_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * (ctx.saved_tensors[0] > 0)


class Squared(Function):
    """Autograd cannot follow its forward; right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.detach().pow(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 2 * gradient * ctx.saved_tensors[0]


class Looked(Function):
    """Rows of a table; right."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.rows = table.shape[0]
        return table[rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        result = gradient.new_zeros(ctx.rows, gradient.shape[-1])
        return None, result.index_put((rows,), gradient, accumulate=True)


class Weighted(Function):
    """Its gradient depends on the position in the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * torch.arange(gradient.shape[-1])


class PerElement(Function):
    """Its gradient depends on how many elements there are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient / gradient.numel() ** 0.5


class Noisy(Function):
    """Draws random numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * torch.rand_like(gradient)


class OfPositive(Function):
    """Of positive numbers only; right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient / ctx.saved_tensors[0]


class OnlyElsewhere(Function):
    """Cannot run on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        raise AssertionError("not here")


def tensor(*shape: int, kind: torch.dtype = torch.float32) -> Given:
    return Given(shape, kind, kind.is_floating_point)


def found(function: Any, *arguments: Any) -> Finding:
    return examine(Trial(function.apply, _forward(function), arguments, {}))


X = tensor(2, 6, 16)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (functions.SwiGLU, (X, X)),
        (functions.SwiGLU, (tensor(2, 2048, 11008), tensor(2, 2048, 11008))),
        (functions.RMSNorm, (X, tensor(16), 1e-6)),
        (functions.RMSNorm, (tensor(4, 1024, 4096), tensor(4096), 1e-6)),
        (functions.NormedLinear, (X, tensor(16), tensor(10, 16))),
        (functions.LinearTanh, (X, tensor(10, 16))),
        (Relu, (X,)),
        (Squared, (X,)),
        (OfPositive, (X,)),
        (Looked, (tensor(3, kind=torch.int64), tensor(10, 4))),
    ],
)
def test_derivatives(function: Any, arguments: tuple[Any, ...]) -> None:
    result = found(function, *arguments)
    assert result.is_derivative
    assert result.is_linear


@pytest.mark.parametrize(
    ("function", "arguments", "linear", "free"),
    [
        (functions.Normalised, (X,), False, ()),
        (functions.Clamped, (X, 0.1), False, (0, 1, 2)),
        (functions.Clamped, (X, 1e-5), False, (0, 1, 2)),
        (functions.Clamped, (X, 1e5), False, (0, 1, 2)),
        (functions.Reversed, (X, 0.5), True, (0, 1, 2)),
        (functions.Rounded, (X,), True, (0, 1, 2)),
        (functions.Signed, (X,), True, (0, 1, 2)),
        (functions.HeadsNormalised, (X,), False, (0, 1)),
        (functions.WithLoss, (X, tensor(1)), False, None),
        (Weighted, (X,), True, (0, 1)),
        (PerElement, (X,), True, ()),
        (Noisy, (X,), True, ()),
    ],
)
def test_other_gradients(
    function: Any, arguments: tuple[Any, ...], linear: bool, free: tuple[int, ...] | None
) -> None:
    assert found(function, *arguments) == Finding(False, linear, free)


def test_what_cannot_be_tried() -> None:
    assert "given a Linear" in found(functions.Unknown, X, nn.Linear(2, 2)).why
    assert "AssertionError: not here" in found(OnlyElsewhere, X).why
    assert "too large" in found(functions.SwiGLU, tensor(1021, 1031), tensor(1021, 1031)).why


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    found(Noisy, X)
    assert (torch.rand(1), random.random()) == expected


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = functions.Clamped.apply(x, 0.1)
        z = functions.SwiGLU.apply(y, y)
        return functions.Clamped.apply(z, 0.1) * functions.Normalised.apply(x)


def test_functions_of_a_trace() -> None:
    record = trace(Twice(), (torch.ones(2, 4),))
    applied = [call for call in record.calls if call.name == "apply"]
    assert [call.last > call.first for call in applied] == [True] * 4
    assert all(
        one.call in applied for one in record.operations if one.name != "aten.mul" or one.call in applied
    )
    written = judge(record, ())
    assert [one.name for one in written] == ["Clamped", "Clamped", "Normalised"]
    assert written[0].finding is written[1].finding, "alike: tried once"
    assert not any(map(is_linear, written))
    assert [len(list(whole_dimensions(one))) for one in written] == [0, 0, 4]
    assert sum("is not linear in the gradient" in one for one in record.warnings) == 3
