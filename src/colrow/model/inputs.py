"""Example inputs for models of transformers, made from their forward's signature and found by trying."""

from __future__ import annotations

import inspect
import linecache
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from colrow.model.images import image_token, insert_image_tokens
from colrow.model.makers import Maker, makers_of, to_device
from colrow.model.memory import LimitedTensors
from colrow.trace import TraceError, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_RUNS = 32
"""So many calls of one model are tried."""


@dataclass(frozen=True)
class Recipe:
    """Which arguments a model is called with: their names, each with the variant of its shape.

    Attributes:
        arguments: as described.
        with_images: whether words stand for features of images.
    """

    arguments: tuple[tuple[str, int], ...]
    with_images: bool = False

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.arguments]

    def with_argument(self, name: str) -> Recipe:
        return replace(self, arguments=(*self.arguments, (name, 0)))

    def with_next_variant(self, name: str) -> Recipe:
        return replace(self, arguments=tuple((one, at + (one == name)) for one, at in self.arguments))


def make_inputs(model: PreTrainedModel, recipe: Recipe, seed: int) -> dict[str, Any]:
    """The arguments of a recipe; no cache is asked for."""
    make = Maker(model, torch.Generator().manual_seed(seed))
    inputs: dict[str, Any] = {name: makers_of(name)[variant](make) for name, variant in recipe.arguments}
    if recipe.with_images:
        insert_image_tokens(model, inputs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def call(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Run the model; on the meta device, where data is needed that it does not have there, record it."""
    limit: AbstractContextManager[Any] = nullcontext() if model.device.type == "meta" else LimitedTensors()
    try:
        with torch.no_grad(), limit:
            model(**to_device(inputs, model.device))
    except (RuntimeError, NotImplementedError) as error:
        if model.device.type != "meta" or "meta" not in str(error):
            raise
        with suppress(TraceError):  # the call is right, whatever comes of it
            trace(model, (), inputs, routing="guess")


def find_recipe(model: PreTrainedModel, most: int = MOST_RUNS) -> tuple[Recipe | None, str]:
    """A way to call a model, and why there is none.

    The likeliest are tried first; then with the arguments that errors ask for, then with other shapes; with
    images among the words if the model takes them. At most ``most`` calls are tried.
    """
    first = [*_first_recipes(model)]
    recipe, error = _search(model, first, most)
    if image_token(model) is None or "input_ids" not in inspect.signature(model.forward).parameters:
        return recipe, error
    if recipe is not None and recipe.names != ["input_ids"]:
        return recipe, error
    images = [replace(one, with_images=True) for one in first if "input_ids" in one.names][:1]
    images = [one if "pixel_values" in one.names else one.with_argument("pixel_values") for one in images]
    for _ in makers_of("pixel_values")[1:] if images else ():
        images.append(images[-1].with_next_variant("pixel_values"))
    with_images, _ = _search(model, images, most)
    return with_images or recipe, error


def _search(model: PreTrainedModel, queue: list[Recipe], most: int) -> tuple[Recipe | None, str]:
    seen = set(queue)
    told = "its forward has required arguments of which only the names are known"
    longest = 0
    for _ in range(most):
        if not queue:
            break
        recipe = queue.pop(0)
        try:
            call(model, make_inputs(model, recipe, 0))
            return recipe, ""
        except Exception as error:
            text = _told(error)
        if len(recipe.arguments) > longest:
            longest, told = len(recipe.arguments), f"with {', '.join(recipe.names)}: {text}"
        asked = [recipe.with_argument(name) for name in _asked(model, recipe, text)]
        others = [
            recipe.with_next_variant(name)
            for name, variant in recipe.arguments
            if variant + 1 < len(makers_of(name)) and not (recipe.with_images and name == "input_ids")
        ]
        queue = [
            *(one for one in asked if one not in seen),
            *queue,
            *(one for one in others if one not in seen),
        ]
        seen.update(asked, others)
    return None, told


def _told(error: Exception) -> str:
    """An error with the statement of the model's code that it comes from."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "modeling_" in one.filename]
    text = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
    if not frames or frames[-1].lineno is None:
        return text
    lines = range(frames[-1].lineno, (frames[-1].end_lineno or frames[-1].lineno) + 1)
    code = " ".join(linecache.getline(frames[-1].filename, line).strip() for line in lines)
    return f"{text} ({code[:300]})"


def _asked(model: PreTrainedModel, recipe: Recipe, text: str) -> list[str]:
    """Arguments that a text names and that are not given."""
    parameters = inspect.signature(model.forward).parameters
    words = set(re.findall(r"[a-z_]{4,}", text.lower()))
    exact = [name for name in parameters if name in words]
    # a part of the model may know an argument by a shorter name
    longer = [name for name in parameters if any(name.endswith(f"_{word}") for word in words)]
    return [name for name in dict.fromkeys([*exact, *longer]) if makers_of(name) and name not in recipe.names]


def _first_recipes(model: PreTrainedModel) -> Iterator[Recipe]:
    parameters = inspect.signature(model.forward).parameters
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [
        name for name, one in parameters.items() if one.default is one.empty and one.kind not in variable
    ]
    if not all(makers_of(name) for name in required):
        return
    main = model.main_input_name
    mains = [
        one for one in ([main] if isinstance(main, str) else main) if one in parameters and makers_of(one)
    ]
    ids = ["input_ids"] if "input_ids" in parameters else []
    others = ("pixel_values", "input_features", "input_values", "inputs_embeds")
    decoder = "decoder_input_ids" in parameters and model.config.is_encoder_decoder
    for names in (ids, mains, [*ids, *mains], *([one] for one in others if one in parameters)):
        for second in (["decoder_input_ids"], []) if decoder else ([],):
            if all_names := dict.fromkeys([*required, *names, *second]):
                yield Recipe(tuple((name, 0) for name in all_names))
