"""Labels for models that compute a loss from them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Labels = Literal["input_ids", "decoder_input_ids", "classes", "each", "images"]
"""What labels are like: an input, one class for each example, or one for each logit's place."""


def find_labels(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Labels | None:
    """Which labels a model takes in training, found by trying; ``None`` if there are none that it takes."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return None
    candidates: tuple[Labels, ...] = ("decoder_input_ids", "input_ids", "classes", "each", "images")
    for kind in candidates:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                labels = make_labels(model, inputs, kind, torch.Generator().manual_seed(0))
                loss = model(**inputs, labels=labels).loss
        except Exception:
            continue
        if isinstance(loss, Tensor) and loss.numel() == 1 and bool(loss.isfinite()):
            return kind
    return None


def make_labels(
    model: PreTrainedModel, inputs: Mapping[str, Any], kind: Labels, generator: torch.Generator
) -> Tensor:
    """Labels of a kind: int64.

    Raises:
        KeyError, AttributeError, ValueError: if the model or its inputs are not such.
    """
    if kind in ("input_ids", "decoder_input_ids"):
        ids: Tensor = inputs[kind]
        return ids.roll(-1, -1).contiguous()
    first = next(one for one in inputs.values() if isinstance(one, Tensor))
    if kind == "classes":
        return torch.randint(int(model.config.num_labels or 2), (first.shape[0],), generator=generator)
    if kind == "images":
        return torch.randint(
            int(model.config.num_labels or 2), (first.shape[0], *first.shape[-2:]), generator=generator
        )
    with torch.no_grad():
        logits = model(
            **{n: x.to(model.device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
        ).logits
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
