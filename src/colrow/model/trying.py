"""How a model can be called, found out by running a small one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colrow.model.inputs import MOST_RUNS, Recipe, call, find_recipe, make_inputs
from colrow.model.labels import Labels, find_labels

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MOST_PARAMETERS = 30_000_000
"""Models up to this size, with buffers, are run for real; larger ones take too much time and memory."""


@dataclass(frozen=True)
class Attempt:
    """What became of a configuration.

    Attributes:
        parameters: of the model; -1 if it could not be built.
        recipe: a way to call it; ``None`` if none was found.
        error: why not, in one line.
    """

    parameters: int = -1
    recipe: Recipe | None = None
    error: str = ""


@dataclass(frozen=True)
class Calls:
    """What is known of how the models of a configuration can be called.

    Attributes:
        model_class: that of the models.
        recipe: of the arguments.
        labels: which ones training takes, if any.
        trains: whether the model runs in training mode.
        small: a small configuration for which all this was found out.
    """

    model_class: type[PreTrainedModel]
    recipe: Recipe
    labels: Labels | None
    trains: bool
    small: PreTrainedConfig | None = None


def known_calls(config: PreTrainedConfig) -> Calls:
    """How the model of a configuration can be called: a small one tells, or else the whole on meta.

    Raises:
        ValueError: if no way was found.
    """
    from colrow.model.classes import model_class
    from colrow.model.shrink import find_small

    try:
        small = find_small(config)
    except ValueError:
        small = None
    if small is not None and small.recipe is not None:
        model = build(small.model_class, copy_of(small.config), "cpu")
        labels, trains = _training(model, small.recipe)
        return Calls(small.model_class, small.recipe, labels, trains, small.config)
    return calls_of(build(model_class(config), copy_of(config), "meta"))


def calls_of(model: PreTrainedModel) -> Calls:
    """How this model can be called, on whatever device it is.

    Raises:
        ValueError: if no way was found.
    """
    recipe, error = find_recipe(model)
    if recipe is None:
        raise ValueError(
            f"no inputs for {type(model).__name__} were found, {error}. Write a function that "
            "returns (model, inputs) and name it as package.module:function"
        )
    labels, trains = (None, True) if model.device.type == "meta" else _training(model, recipe)
    return Calls(type(model), recipe, labels, trains)


def _training(model: PreTrainedModel, recipe: Recipe) -> tuple[Labels | None, bool]:
    """The labels that a model takes in training mode, and whether it runs in it."""
    inputs = make_inputs(model, recipe, 0)
    model.train()
    try:
        labels = find_labels(model, inputs)
        if labels is None:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                model(**inputs)
    except Exception:
        return None, False
    finally:
        model.eval()
    return labels, True


def build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, device: str, seed: int = 0
) -> PreTrainedModel:
    """The model in evaluation mode, with random weights in the configuration's precision."""
    precision = config.dtype if isinstance(config.dtype, torch.dtype) else torch.get_default_dtype()
    before = torch.get_default_dtype()
    torch.set_default_dtype(precision)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(before)


def copy_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same configuration: a model changes its own as it is built."""
    return copy.deepcopy(config)


def try_out(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    recipe: Recipe | None = None,
    most: int = MOST_RUNS,
) -> Attempt:
    """Build on the meta device, then, if the model is small, for real, and run it at most so often."""
    try:
        model = build(model_class, copy_of(config), "meta")
        parameters = sum(one.numel() for one in model.parameters())
        if parameters + sum(one.numel() for one in model.buffers()) > MOST_PARAMETERS:
            return Attempt(parameters, error=f"it has {parameters} parameters")
        model = build(model_class, copy_of(config), "cpu")
    except Exception as error:
        return Attempt(error=f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
    if recipe is not None and runs(model, recipe):
        return Attempt(parameters, recipe)
    return Attempt(parameters, *find_recipe(model, most))


def runs(model: PreTrainedModel, recipe: Recipe) -> bool:
    """Whether the model can be called so, on its device."""
    try:
        call(model, make_inputs(model, recipe, 0))
    except Exception:
        return False
    return True
