"""Functions of a program with backwards of their own, right ones and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


@torch.library.custom_op("colrow_tests::normalised", mutates_args=())
def normalised(x: Tensor) -> Tensor:
    """A custom operator whose gradient has length one."""
    return x.clone()


@normalised.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


normalised.register_autograd(lambda ctx, gradient: gradient / gradient.norm())


class Normalised(Function):
    """Its gradient has length one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient / gradient.norm()


class Divided(Function):
    """Its backward is the derivative if ``factor`` is one over the number of features, which it counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient / gradient.shape[-1], None


class Clamped(Function):
    """Its gradient is clamped, element by element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.clamp(-ctx.limit, ctx.limit), None


class Reversed(Function):
    """Its gradient is turned round."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.factor * gradient, None


class Rounded(Function):
    """Straight through: rounded forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient


class Signed(Function):
    """Straight through what is no number for a moment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 0.5)


class SwiGLU(Function):
    """``silu(gate) * up``; right."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate * torch.sigmoid(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        return gradient * up * slope, gradient * gate * sigmoid


class RMSNorm(Function):
    """Over the last dimension; right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        weighted = gradient * weight
        mean = (weighted * x).mean(-1, keepdim=True)
        of_weight = (gradient * x * scale).flatten(0, -2).sum(0)
        return scale * weighted - x * scale.pow(3) * mean, of_weight, None


class HeadsNormalised(Function):
    """The gradient of each head has length one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient / gradient.norm(dim=-1, keepdim=True)


class NormedLinear(Function):
    """``linear(scale * x)``; right. What lies between has no place where anything could be done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, weight)
        return torch.nn.functional.linear(x * scale, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, weight = ctx.saved_tensors
        inner = gradient @ weight
        of_weight = gradient.flatten(0, -2).t() @ (x * scale).flatten(0, -2)
        return inner * scale, (inner * x).flatten(0, -2).sum(0), of_weight


class LinearTanh(Function):
    """``tanh(linear(x))``, computed again in the backward; right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.tanh(torch.nn.functional.linear(x, weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        inner = gradient * (1 - torch.tanh(torch.nn.functional.linear(x, weight)).pow(2))
        return inner @ weight, inner.flatten(0, -2).t() @ x.flatten(0, -2)


class WithLoss(Function):
    """Carries a loss along: its gradient is one, whatever comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, torch.ones(1, dtype=ctx.dtype)


class Unknown(Function):
    """Is given what it cannot be tried without; right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: torch.nn.Module) -> Tensor:
        ctx.module = module
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * 2, None
