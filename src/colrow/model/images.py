"""Texts with images in them, for language models that see."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from colrow.model.makers import BATCH
from colrow.trace import trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def image_token(model: PreTrainedModel) -> int | None:
    """The word that stands for a feature of an image, if the model has one."""
    if not hasattr(model, "get_image_features"):
        return None
    for name in ("image_token_id", "image_token_index"):
        number = getattr(model.config, name, None)
        if isinstance(number, int):
            return number
    return None


def insert_image_tokens(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Let the words begin with as many image tokens as the images have features, in place.

    Raises:
        ValueError: if the features do not fit the words; other errors if they cannot be computed.
    """
    token = image_token(model)
    if token is None:
        raise ValueError(f"{type(model).__name__} has no word for images")
    shapes = _feature_shapes(model, inputs)
    table: Any = model.get_input_embeddings()
    width = table.weight.shape[-1]
    if any(shape[-1] != width for shape in shapes):
        raise ValueError(f"features of images are {shapes[0][-1]} wide, those of words {width}")
    count = sum(shape.numel() // shape[-1] for shape in shapes)
    words: Tensor = inputs["input_ids"]
    rows = BATCH if count % BATCH == 0 else 1
    before = words[:, :1].repeat(1, count // rows)
    before[:rows] = token
    ids = torch.cat([before, words], 1)
    inputs["input_ids"] = ids
    for name in inputs:
        if name.endswith("token_type_ids"):
            inputs[name] = (ids == token).long()
        elif name == "attention_mask":
            inputs[name] = torch.ones_like(ids)


def _feature_shapes(model: Any, inputs: dict[str, Any]) -> list[torch.Size]:
    known = inspect.signature(model.get_image_features).parameters
    given = {name: one for name, one in inputs.items() if name in known and name != "input_ids"}
    vision = _Vision(model)
    if model.device.type == "meta":
        # sizes of images are numbers that a forward on meta could not read
        return [torch.Size(value.shape) for _, value in trace(vision, (), given).outputs]
    with torch.no_grad():
        return [one.shape for one in vision(**given)]


class _Vision(nn.Module):
    """The part of a model that computes features of images."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Any) -> tuple[Tensor, ...]:
        found = self.model.get_image_features(**given)
        found = getattr(found, "pooler_output", found)
        return (found,) if isinstance(found, Tensor) else tuple(found)
