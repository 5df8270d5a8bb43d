"""Calls of a model by mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from colrow.model.inputs import Recipe, make_inputs
from colrow.model.labels import make_labels
from colrow.trace import Example

if TYPE_CHECKING:
    from colrow.model.trying import Calls


def examples_of(model: Any, calls: Calls, seed: int) -> dict[str, Example]:
    """``training``, if the model runs in training mode, and ``evaluation``.

    Args:
        model: of transformers, on any device.
        calls: what is known of how it can be called.
        seed: of the random inputs.
    """
    try:
        inputs = make_inputs(model, calls.recipe, seed)
    except Exception:
        if not calls.recipe.with_images:
            raise
        # the features of its images are not as wide as its words: it is good for text only
        inputs = make_inputs(model, Recipe((("input_ids", 0),)), seed)
    found = {}
    if calls.trains:
        training = dict(inputs)
        if calls.labels is not None:
            training["labels"] = make_labels(model, inputs, calls.labels, torch.Generator().manual_seed(seed))
        found["training"] = Example((), training)
    return found | {"evaluation": Example((), inputs)}


def calls_for(model: Any, seed: int = 0) -> dict[str, Example]:
    """Calls of a transformers model by mode, see :func:`examples_of`; found by trying.

    What labels a model on the meta device takes, a small one of its configuration tells.

    Args:
        model: of transformers, on any device.
        seed: of the random inputs.

    Raises:
        ValueError: if no inputs were found with which it can be called.
    """
    from colrow.model.trying import calls_of, known_calls

    if model.device.type == "meta":
        calls = known_calls(model.config)
        if calls.model_class is type(model):
            return examples_of(model, calls, seed)
    return examples_of(model, calls_of(model), seed)
