"""transformers rounds to single precision in some places; here is its arithmetic in float64 throughout."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss


def _normalise(self: Any, hidden: Tensor) -> Tensor:
    """RMSNorm, without the rounding."""
    variance = hidden.pow(2).mean(-1, keepdim=True)
    result: Tensor = self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)
    return result


def _causal_loss(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
    """The loss of causal models, without the rounding."""
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    count = options.get("num_items_in_batch")
    loss = torch.nn.functional.cross_entropy(
        logits.view(-1, vocab_size), shifted.view(-1), reduction="mean" if count is None else "sum"
    )
    return loss if count is None else loss / count


def in_double(model: nn.Module) -> nn.Module:
    """``model`` in float64, with norms and (for causal models) loss that stay there; in place."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_normalise, module)  # type: ignore[method-assign]
    if getattr(model, "loss_function", None) is ForCausalLMLoss:
        model.loss_function = _causal_loss  # type: ignore[assignment]
    return model.double()
